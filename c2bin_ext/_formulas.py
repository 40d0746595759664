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
    for gram, clusters in layout.blocks(grams):
        logits = gram / options.temperature
        if norms is not None:
            firsts, seconds = norms[:, clusters].chunk(2)
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


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: Layout, options: Contrast, grams: Tensor, squares: Tensor
    ) -> Tensor:
        pairs, norms = layout.pairs, _inverse_norms(layout, squares)
        firsts, seconds = norms[:pairs] / options.temperature, norms[pairs:]
        exponentials = torch.empty_like(grams)
        positive = torch.cat(
            [gram.diagonal(dim1=1, dim2=2) for gram, _ in layout.blocks(grams)], dim=1
        )
        rows, weights = torch.empty_like(firsts), torch.empty_like(firsts)
        columns = torch.empty_like(firsts) if options.symmetric else rows
        blocks = list(layout.blocks(exponentials))
        for (gram, clusters), (block, _) in zip(layout.blocks(grams), blocks, strict=True):
            torch.mul(gram, firsts[:, clusters, None], out=block)
            block.mul_(seconds[:, None, clusters])
        exponentials.exp_()
        for block, clusters in blocks:
            if not options.positive_in_denominator:
                block.diagonal(dim1=1, dim2=2).zero_()
            torch.sum(block, dim=2, out=rows[:, clusters])
            if options.symmetric:
                torch.sum(block, dim=1, out=columns[:, clusters])
            # Half of the mean over clusters and pairs, for each direction.
            weights[:, clusters].fill_(0.5 / (pairs * block.shape[1]))
        ctx.save_for_backward(grams, squares, exponentials, rows, columns, weights, norms)
        ctx.layout, ctx.options = layout, options
        positive.mul_(firsts).mul_(seconds)
        return (rows * columns).log_().sub_(positive, alpha=2).mul_(weights).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, options = ctx.layout, ctx.options
        grams, squares, exponentials, rows, columns, weights, norms = ctx.saved_tensors
        if needs_formula():

            def formula(grams: Tensor, squares: Tensor) -> tuple[Tensor]:
                return (_contrast(layout, options, grams, squares),)

            needed = ctx.needs_input_grad[2:]
            return None, None, *differentiate(formula, (grams, squares), needed, (grad,))
        # dL/dS is softmax over rows (and over columns) minus the identity; S_kj is the Gram
        # matrix times f_k s_j, inverse norms over τ, and so dL/dS_kj times f_k s_j its gradient.
        pairs = layout.pairs
        firsts, seconds = norms[:pairs] / options.temperature, norms[pairs:]
        weights = weights * grad
        by_row, by_column = weights / rows, weights / columns
        if not options.symmetric:
            by_row, by_column = 2 * by_row, torch.zeros_like(by_column)
        by_row.mul_(firsts)
        by_column.mul_(seconds)
        at_positive = torch.mul(weights, -2).mul_(firsts).mul_(seconds)
        grad_grams = torch.empty_like(grams)
        for block, clusters in layout.blocks(grad_grams):
            torch.mul(by_row[:, clusters, None], seconds[:, None, clusters], out=block)
            block.addcmul_(firsts[:, clusters, None], by_column[:, None, clusters])
        grad_grams.mul_(exponentials)
        for block, clusters in layout.blocks(grad_grams):
            block.diagonal(dim1=1, dim2=2).add_(at_positive[:, clusters])
        # Through the norms: S falls with ‖c‖, and Σ_j dL/dS_kj S_kj is what a Gram matrix times its
        # gradient sums up to.
        grad_squares = torch.empty_like(norms)
        for block, clusters in layout.blocks(grad_grams * grams):
            torch.sum(block, dim=2, out=grad_squares[:pairs, clusters])
            torch.sum(block, dim=1, out=grad_squares[pairs:, clusters])
        grad_squares.mul_(norms).mul_(norms).mul_(-0.5)
        return None, None, grad_grams, grad_squares


def _balance(layout: Layout, masses: Tensor) -> Tensor:
    gaps = []
    for clusters in layout.spans:
        mass = masses[:, clusters]
        # Without any mass, shares and gradient are 0.
        share = mass / torch.threshold(mass.sum(dim=1, keepdim=True), SMALLEST_MASS, torch.inf)
        # Σ ŝ log(K ŝ) is log K - H(ŝ) without the cancellation near balance.
        ratio = share * share.shape[1]
        gap = (share * ratio.clamp_min(SMALLEST_RATIO).log()).sum(dim=1)
        # Rounding can leave it a little below 0; the derivatives there are those of the formula.
        gaps.append((gap + (-gap).clamp_min(0).detach()).mean())
    return reduce(torch.add, gaps)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, masses: Tensor) -> Tensor:
        def over_heads(values: Tensor) -> list[Tensor]:
            return [values[:, span].sum(dim=1, keepdim=True) for span in layout.spans]

        def spread(values: list[Tensor]) -> Tensor:
            sizes = zip(values, layout.num_clusters, strict=True)
            return torch.cat([value.expand(-1, k) for value, k in sizes], dim=1)

        total = torch.threshold(spread(over_heads(masses)), SMALLEST_MASS, torch.inf)
        share = masses / total
        ratio = torch.empty_like(share)
        for span, k in zip(layout.spans, layout.num_clusters, strict=True):
            torch.mul(share[:, span], k, out=ratio[:, span])
        floored = ratio.clamp_min(SMALLEST_RATIO)
        log = floored.log()
        if ctx.needs_input_grad[1]:
            slope = torch.addcdiv(log, ratio, floored)
            slope.sub_(spread(over_heads(slope * share))).div_(total)
            ctx.save_for_backward(masses, slope)
            ctx.layout = layout
        gaps = torch.cat(over_heads(share * log), dim=1)
        return gaps.clamp_min_(0).sum() / len(masses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        masses, slope = ctx.saved_tensors
        if needs_formula():

            def formula(masses: Tensor) -> tuple[Tensor]:
                return (_balance(ctx.layout, masses),)

            return None, *differentiate(formula, (masses,), [True], (grad,))
        return None, slope * (grad / len(masses))
