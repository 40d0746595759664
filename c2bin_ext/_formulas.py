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
    is_batched,
    is_eager,
)
from c2bin_ext.statistics import BatchStatistics, Layout, of_head

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
    closed = options.similarity == "cosine" and options.temperature >= _MIN_TEMPERATURE
    losses = []
    for grams, _, squares, layout in statistics.groups:
        loss = _Contrast.apply if closed and is_eager(grams, squares) else _contrast
        losses.append(loss(layout, options, grams, squares))
    return reduce(torch.add, losses)


def balance(statistics: BatchStatistics) -> Tensor:
    """Eq. 5 as log K - H(ŝ), summed over heads and averaged over views."""
    losses = []
    for _, masses, _, layout in statistics.groups:
        loss = _Balance.apply if is_eager(masses) else _balance
        losses.append(loss(layout, masses))
    return reduce(torch.add, losses)


def _contrast(layout: Layout, options: Contrast, grams: Tensor, squares: Tensor) -> Tensor:
    losses = []
    norms = _inverse_norms(layout, squares) if options.similarity == "cosine" else None
    for head, k in enumerate(layout.num_clusters):
        logits = of_head(grams, head, k) / options.temperature
        if norms is not None:
            firsts, seconds = of_head(norms, head, k).chunk(2)
            logits = logits * firsts[:, :, None] * seconds[:, None, :]
        negatives = logits
        if not options.positive_in_denominator:
            own = torch.eye(k, dtype=torch.bool, device=logits.device)
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


def _sizes(layout: Layout, like: Tensor) -> Tensor | int:
    """Return K of every head, (heads, 1), or the one that all have."""
    if len(set(layout.num_clusters)) == 1:
        return layout.num_clusters[0]
    # Filled: a copy from the host would wait for the GPU.
    sizes = like.new_empty(len(layout.num_clusters), 1)
    for row, k in zip(sizes.unbind(), layout.num_clusters, strict=True):
        row.fill_(k)
    return sizes


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: Layout, options: Contrast, grams: Tensor, squares: Tensor
    ) -> Tensor:
        norms = _inverse_norms(layout, squares)
        firsts, seconds = norms.chunk(2)
        firsts = firsts / options.temperature
        sizes = _sizes(layout, grams)
        exponentials = torch.mul(grams, firsts.unsqueeze(3)).mul_(seconds.unsqueeze(2)).exp_()
        if not options.positive_in_denominator:
            exponentials.diagonal(0, 2, 3).zero_()
        if isinstance(sizes, Tensor):
            # What fills heads up counts nowhere: its exponentials are 0, their sums 1.
            used = (torch.arange(grams.shape[3], device=grams.device) < sizes).to(grams.dtype)
            exponentials.mul_(used.unsqueeze(2)).mul_(used.unsqueeze(1))
        rows = exponentials.sum(3)
        columns = exponentials.sum(2) if options.symmetric else rows
        if isinstance(sizes, Tensor):
            empty = 1 - used
            rows, columns = rows + empty, columns + empty
        # Half of the mean over clusters and pairs, for each direction.
        ctx.weights = 0.5 / (layout.pairs * sizes)
        ctx.save_for_backward(grams, squares, exponentials, rows, columns, norms, firsts)
        ctx.layout, ctx.options = layout, options
        positive = grams.diagonal(0, 2, 3) * firsts * seconds
        return (rows * columns).log_().sub_(positive, alpha=2).mul_(ctx.weights).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, options = ctx.layout, ctx.options
        grams, squares, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True, and only then

            def formula(grams: Tensor, squares: Tensor) -> tuple[Tensor]:
                return (_contrast(layout, options, grams, squares),)

            needed = ctx.needs_input_grad[2:]
            return None, None, *differentiate(formula, (grams, squares), needed, (grad,))
        exponentials, rows, columns, norms, firsts = saved
        seconds = norms[layout.pairs :]
        # dL/dS is softmax over rows (and over columns) minus the identity; S_kj is the Gram
        # matrix times f_k s_j, inverse norms over τ, and so dL/dS_kj times f_k s_j its gradient.
        batched = is_batched(grad)
        weights = ctx.weights if batched else ctx.weights * grad
        by_row, by_column = weights / rows, weights / columns
        if not options.symmetric:
            by_row, by_column = by_row.mul_(2), by_column.zero_()
        at_positive = (firsts * seconds).mul_(weights)
        first, second = firsts.unsqueeze(3), seconds.unsqueeze(2)
        grad_grams = torch.mul(by_row.mul_(firsts).unsqueeze(3), second)
        grad_grams.addcmul_(first, by_column.mul_(seconds).unsqueeze(2)).mul_(exponentials)
        grad_grams.diagonal(0, 2, 3).sub_(at_positive, alpha=2)
        # Through the norms: S falls with ‖c‖, and Σ_j dL/dS_kj S_kj is what a Gram matrix times its
        # gradient sums up to.
        product = grad_grams * grams
        grad_squares = torch.cat([product.sum(3), product.sum(2)])
        grad_squares.mul_(norms).mul_(norms).mul_(-0.5)
        if batched:
            grad_grams, grad_squares = grad_grams * grad, grad_squares * grad
        return None, None, grad_grams, grad_squares


def _balance(layout: Layout, masses: Tensor) -> Tensor:
    gaps = []
    for head, k in enumerate(layout.num_clusters):
        mass = of_head(masses, head, k)
        # Without any mass, shares and gradient are 0.
        share = mass / torch.threshold(mass.sum(dim=1, keepdim=True), SMALLEST_MASS, torch.inf)
        # Σ ŝ log(K ŝ) is log K - H(ŝ) without the cancellation near balance.
        ratio = share * k
        gap = (share * ratio.clamp_min(SMALLEST_RATIO).log()).sum(dim=1)
        # Rounding can leave it a little below 0; the derivatives there are those of the formula.
        gaps.append((gap + (-gap).clamp_min(0).detach()).mean())
    return reduce(torch.add, gaps)


class _Balance(torch.autograd.Function):
    """Empty clusters, with which heads are filled up, add nothing to H."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, masses: Tensor) -> Tensor:
        total = torch.threshold(masses.sum(dim=2, keepdim=True), SMALLEST_MASS, torch.inf)
        share = masses / total
        ratio = share * _sizes(layout, masses)
        floored = ratio.clamp_min(SMALLEST_RATIO)
        log = floored.log()
        if ctx.needs_input_grad[1]:
            slope = torch.addcdiv(log, ratio, floored)
            slope.sub_((slope * share).sum(dim=2, keepdim=True)).div_(total)
            ctx.save_for_backward(masses, slope)
            ctx.layout = layout
        return (share * log).sum(dim=2).clamp_min_(0).sum() / len(masses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, (masses, slope) = ctx.layout, ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True, and only then

            def formula(masses: Tensor) -> tuple[Tensor]:
                return (_balance(layout, masses),)

            return None, *differentiate(formula, (masses,), [True], (grad,))
        return None, slope * (grad / len(masses))
