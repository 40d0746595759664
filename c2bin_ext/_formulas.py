"""Eq. 1, 4 and 5 from the sums over instances: K x K numbers a head, whatever the batch.

Each is a formula that autograd follows, and, for eager training steps, the same with its gradient
in closed form. Autograd of the formulas alone would walk several times through every K x K
intermediate and pay the overhead of some forty small kernels a head; in closed form all heads and
pairs share kernels, and the one matrix of exponentials becomes the gradient of the Gram matrix.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from c2bin_ext._numerics import (
    SMALLEST_MASS,
    SMALLEST_RATIO,
    differentiate,
    inverse_norm,
    is_eager,
    needs_formula,
)
from c2bin_ext.statistics import BatchStatistics, Layout

# In closed form exp(S) is taken without subtracting a maximum first. Cosines are at most 1, so that
# S is at most 1/τ, and sums of exp(30) stay far inside float32, as do their inverses.
_MIN_TEMPERATURE = 1 / 30
# Entries of a tile: half a MiB in float32. Usual heads have fewer, and are one tile each.
_TILE = 2**17


class Contrast(NamedTuple):
    """The options of Eq. 4."""

    temperature: float
    similarity: str
    positive_in_denominator: bool
    symmetric: bool


def alignment(statistics: BatchStatistics) -> Tensor:
    """Eq. 1: one minus the mean cosine, over instances and directions."""
    cosines = statistics.cosines
    return 1 - cosines.sum() / (statistics.count * len(cosines))


def contrast(statistics: BatchStatistics, options: Contrast) -> Tensor:
    """Eq. 4, averaged over the pairs of a head and summed over heads."""
    grams, squares = statistics.grams, statistics.squares
    if (
        options.similarity == "cosine"
        and options.temperature >= _MIN_TEMPERATURE
        and is_eager(grams, squares)
    ):
        loss: Tensor = _Contrast.apply(statistics.layout, options, grams, squares)
        return loss
    return _contrast(statistics.layout, options, grams, squares)


def balance(statistics: BatchStatistics) -> Tensor:
    """Eq. 5 as log K - H(ŝ), summed over heads and averaged over views."""
    balanced = _Balance.apply if is_eager(statistics.masses) else _balance
    loss: Tensor = balanced(statistics.layout, statistics.masses)
    return loss


def _contrast(layout: Layout, options: Contrast, grams: Tensor, squares: Tensor) -> Tensor:
    losses = []
    norms = _inverse_norms(layout, squares) if options.similarity == "cosine" else None
    for head, gram in enumerate(layout.blocks(grams)):
        logits = gram / options.temperature
        if norms is not None:
            firsts, seconds = layout.split(norms)[head].chunk(2)
            logits = logits * firsts[:, :, None] * seconds[:, None, :]
        negatives = logits
        if not options.positive_in_denominator:
            own = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
            negatives = logits.masked_fill(own, -torch.inf)
        # Subtracted cluster by cluster: with dot products both run into the thousands, where a
        # difference of means would lose digits.
        positive = logits.diagonal(dim1=1, dim2=2)
        loss = (negatives.logsumexp(dim=2) - positive).mean()
        if options.symmetric:
            loss = (loss + (negatives.logsumexp(dim=1) - positive).mean()) / 2
        losses.append(loss)
    return reduce(torch.add, losses)


def _inverse_norms(layout: Layout, squares: Tensor) -> Tensor:
    """Return 1/‖c‖ of every column, 0 for empty ones."""
    if len(set(layout.floors)) == 1:
        return inverse_norm(squares, layout.floors[0])
    rows = zip(squares.unbind(), layout.floors, strict=True)
    return torch.stack([inverse_norm(row, floor) for row, floor in rows])


class _Tiles:
    """Rows of Gram matrices that are worked on together: on a CPU as many as stay in its cache."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.offsets = layout, list[int]()
        self.heads: list[list[int]] = []
        for clusters in layout.num_clusters:
            many = max(1, _TILE // (layout.pairs * clusters)) if device.type == "cpu" else clusters
            starts = range(0, clusters, many)
            self.offsets += starts
            self.heads.append([min(many, clusters - start) for start in starts])

    def matrices(self, grams: Tensor) -> list[Tensor]:
        """Return the tiles (pairs, rows, K) of all heads."""
        blocks = zip(self.layout.blocks(grams), self.heads, strict=True)
        return [tile for block, rows in blocks for tile in block.split_with_sizes(rows, 1)]

    def rows(self, clusters: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
        """Return for every tile what belongs to its rows."""
        return clusters.split_with_sizes([size for rows in self.heads for size in rows], dim)

    def columns(self, clusters: Tensor) -> list[Tensor]:
        """Return for every tile what belongs to its columns."""
        parts = zip(self.layout.split(clusters), self.heads, strict=True)
        return [part for part, rows in parts for _ in rows]


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: Layout, options: Contrast, grams: Tensor, squares: Tensor
    ) -> Tensor:
        tiles, norms = _Tiles(layout, grams.device), _inverse_norms(layout, squares)
        firsts, seconds = norms.chunk(2)
        firsts = firsts / options.temperature
        exponentials, weights = torch.empty_like(grams), torch.empty_like(firsts)
        rows, columns = torch.empty_like(firsts), torch.zeros_like(firsts)
        for offset, gram, tile, first, second, row, column in zip(
            tiles.offsets,
            tiles.matrices(grams),
            tiles.matrices(exponentials),
            tiles.rows(firsts.unsqueeze(2), 1),
            tiles.columns(seconds.unsqueeze(1)),
            tiles.rows(rows),
            tiles.columns(columns),
            strict=True,
        ):
            torch.mul(gram, first, out=tile).mul_(second).exp_()
            if not options.positive_in_denominator:
                tile.diagonal(offset, 1, 2).zero_()
            torch.sum(tile, 2, out=row)
            if options.symmetric:
                column.add_(tile.sum(1))
        columns = columns if options.symmetric else rows
        # Half of the mean over clusters and pairs, for each direction.
        for part, k in zip(layout.split(weights), layout.num_clusters, strict=True):
            part.fill_(0.5 / (layout.pairs * k))
        positive = torch.cat([gram.diagonal(0, 1, 2) for gram in layout.blocks(grams)], dim=1)
        ctx.save_for_backward(grams, squares, exponentials, rows, columns, weights, norms, firsts)
        ctx.layout, ctx.options = layout, options
        positive.mul_(firsts).mul_(seconds)
        return (rows * columns).log_().sub_(positive, alpha=2).mul_(weights).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, options = ctx.layout, ctx.options
        grams, squares, *saved = ctx.saved_tensors
        if needs_formula():

            def formula(grams: Tensor, squares: Tensor) -> tuple[Tensor]:
                return (_contrast(layout, options, grams, squares),)

            needed = ctx.needs_input_grad[2:]
            return None, None, *differentiate(formula, (grams, squares), needed, (grad,))
        exponentials, rows, columns, weights, norms, firsts = saved
        seconds = norms[layout.pairs :]
        # dL/dS is softmax over rows (and over columns) minus the identity; S_kj is the Gram
        # matrix times f_k s_j, inverse norms over τ, and so dL/dS_kj times f_k s_j its gradient.
        weights = weights * grad
        by_row, by_column = weights / rows, weights / columns
        if not options.symmetric:
            by_row, by_column = by_row.mul_(2), by_column.zero_()
        at_positive = torch.mul(weights, firsts).mul_(seconds)
        tiles, grad_grams = _Tiles(layout, grams.device), torch.empty_like(grams)
        grad_squares = torch.zeros_like(norms)
        for_firsts, for_seconds = grad_squares.chunk(2)
        for offset, tile, gram, exponential, first, second, row, column, own, left, right in zip(
            tiles.offsets,
            tiles.matrices(grad_grams),
            tiles.matrices(grams),
            tiles.matrices(exponentials),
            tiles.rows(firsts.unsqueeze(2), 1),
            tiles.columns(seconds.unsqueeze(1)),
            tiles.rows(by_row.mul_(firsts).unsqueeze(2), 1),
            tiles.columns(by_column.mul_(seconds).unsqueeze(1)),
            tiles.rows(at_positive),
            tiles.rows(for_firsts),
            tiles.columns(for_seconds),
            strict=True,
        ):
            torch.mul(row, second, out=tile).addcmul_(first, column).mul_(exponential)
            tile.diagonal(offset, 1, 2).sub_(own, alpha=2)
            # Through the norms: S falls with ‖c‖, and Σ_j dL/dS_kj S_kj is what a Gram matrix times
            # its gradient sums up to.
            product = tile * gram
            torch.sum(product, 2, out=left)
            right.add_(product.sum(1))
        return None, None, grad_grams, grad_squares.mul_(norms).mul_(norms).mul_(-0.5)


def _balance(layout: Layout, masses: Tensor) -> Tensor:
    gaps = []
    for mass in layout.split(masses):
        # Without any mass, shares and gradient are 0.
        share = mass / torch.threshold(mass.sum(dim=1, keepdim=True), SMALLEST_MASS, torch.inf)
        # Σ ŝ log(K ŝ) is log K - H(ŝ) without the cancellation near balance.
        ratio = share * share.shape[1]
        gap = (share * ratio.clamp_min(SMALLEST_RATIO).log()).sum(dim=1)
        # Rounding can leave it a little below 0; the derivatives there are those of the formula.
        gaps.append((gap + (-gap).clamp_min(0).detach()).mean())
    return reduce(torch.add, gaps)


class _Balance(torch.autograd.Function):
    """Heads are rows of one array, filled up with empty clusters, which add nothing to H."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, masses: Tensor) -> Tensor:
        heads = pad_sequence([*layout.split(masses.T, 0)], batch_first=True)  # (heads, K, views)
        clusters = heads.new_empty(len(heads), 1, 1)
        for row, k in zip(clusters.unbind(), layout.num_clusters, strict=True):
            row.fill_(k)
        total = torch.threshold(heads.sum(dim=1, keepdim=True), SMALLEST_MASS, torch.inf)
        share = heads / total
        ratio = share * clusters
        floored = ratio.clamp_min(SMALLEST_RATIO)
        log = floored.log()
        if ctx.needs_input_grad[1]:
            slope = torch.addcdiv(log, ratio, floored)
            slope.sub_((slope * share).sum(dim=1, keepdim=True)).div_(total)
            ctx.save_for_backward(masses, slope)
            ctx.layout = layout
        return (share * log).sum(dim=1).clamp_min_(0).sum() / len(masses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, (masses, slope) = ctx.layout, ctx.saved_tensors
        if needs_formula():

            def formula(masses: Tensor) -> tuple[Tensor]:
                return (_balance(layout, masses),)

            return None, *differentiate(formula, (masses,), [True], (grad,))
        rows = (slope * (grad / len(masses))).unbind()
        kept = [row[:k] for row, k in zip(rows, layout.num_clusters, strict=True)]
        return None, torch.cat(kept).T
