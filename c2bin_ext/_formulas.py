"""Eq. 1, 4 and 5 from the sums over instances: K x K numbers a head, whatever the batch.

Each is a formula that autograd follows, and, for eager training steps, the same with its gradient
in closed form. Autograd of the formulas alone would walk several times through every K x K
intermediate and pay the overhead of some forty small kernels a head; in closed form all heads and
pairs share kernels, and the one matrix of exponentials becomes the gradient of the Gram matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from c2bin_ext._numerics import (
    SMALLEST_MASS,
    SMALLEST_RATIO,
    differentiate,
    inverse_norm,
    is_eager,
    wants_formula,
)
from c2bin_ext.statistics import BatchStatistics, Layout

# In closed form exp(S) is taken without subtracting a maximum first. Cosines are at most 1, so that
# S is at most 1/τ, and sums of exp(30) stay far inside float32, as do their inverses.
_MIN_TEMPERATURE = 1 / 30
# Entries of Gram matrices that are worked on at once: as many as a CPU's caches hold.
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


def cluster_terms(
    statistics: BatchStatistics, options: Contrast | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 4, averaged over the pairs of a head, and Eq. 5 as log K - H(ŝ), over the views.

    Both are summed over heads; one whose sums are not there is 0.
    """
    closed = options is None or (
        options.similarity == "cosine" and options.temperature >= _MIN_TEMPERATURE
    )
    terms = []
    for *sums, layout in statistics.groups:
        function = _Terms.apply if closed and is_eager(*sums) else _terms
        terms.append(function(layout, options, *sums))
    contrasts, balances = zip(*terms, strict=True)
    return reduce(torch.add, contrasts), reduce(torch.add, balances)


def _terms(
    layout: Layout, options: Contrast | None, grams: Tensor, masses: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        _contrast(layout, options, grams, squares) if options else grams.new_zeros(()),
        _balance(layout, masses) if layout.views else masses.new_zeros(()),
    )


def _contrast(layout: Layout, options: Contrast, grams: Tensor, squares: Tensor) -> Tensor:
    losses = []
    norms = _inverse_norms(layout, squares) if options.similarity == "cosine" else None
    for head, k in enumerate(layout.num_clusters):
        logits = layout.own(grams, head) / options.temperature
        if norms is not None:
            firsts, seconds = layout.own(norms, head).chunk(2)
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


def _balance(layout: Layout, masses: Tensor) -> Tensor:
    gaps = []
    for head, k in enumerate(layout.num_clusters):
        mass = layout.own(masses, head)
        # Without any mass, shares and gradient are 0.
        share = mass / torch.threshold(mass.sum(dim=1, keepdim=True), SMALLEST_MASS, torch.inf)
        # Σ ŝ log(K ŝ) is log K - H(ŝ) without the cancellation near balance.
        ratio = share * k
        gap = (share * ratio.clamp_min(SMALLEST_RATIO).log()).sum(dim=1)
        # Rounding can leave it a little below 0; the derivatives there are those of the formula.
        gaps.append((gap + (-gap).clamp_min(0).detach()).mean())
    return reduce(torch.add, gaps)


class _Terms(torch.autograd.Function):
    """`_terms` with the gradient in closed form.

    Clusters with which heads are filled up have mass, norm and S = 0. So they add nothing to H;
    exp(S) stays 0 there too, and its sums count as 1, whose logarithm is 0.
    """

    @staticmethod
    def forward(
        ctx: Any, layout: Layout, options: Contrast | None, *sums: Tensor
    ) -> tuple[Tensor, Tensor]:
        grams, masses, squares = sums
        sizes = _sizes(layout, grams)
        contrast = balance = grams.new_zeros(())
        of_contrast: tuple[Tensor, ...] = ()
        of_balance: tuple[Tensor, ...] = ()
        if options is not None:
            contrast, of_contrast = _closed_contrast(layout, options, grams, squares, sizes)
        if layout.views:
            balance, of_balance = _closed_balance(masses, sizes)
        ctx.save_for_backward(*sums, *of_contrast, *of_balance)
        ctx.layout, ctx.options = layout, options
        ctx.set_materialize_grads(False)
        return contrast, balance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layout, options, needed = ctx.layout, ctx.options, ctx.needs_input_grad[2:]
        sums, saved = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        if wants_formula(*grads):
            formula = partial(_terms, layout, options)
            return None, None, *differentiate(formula, sums, needed, grads)
        contrast, balance = grads
        grad_grams = grad_masses = grad_squares = None
        if balance is not None and layout.views:
            grad_masses = saved[-1] * balance
        if contrast is not None and options is not None:
            grad_grams, grad_squares = _contrast_gradients(layout, sums[0], saved, contrast)
        return None, None, grad_grams, grad_masses, grad_squares


def _sizes(layout: Layout, like: Tensor) -> Tensor | int:
    """Return K of every head, (heads, 1), or the one that all have."""
    if not layout.is_filled:
        return layout.num_clusters[0]
    # Filled: a copy from the host would wait for the GPU.
    sizes = like.new_empty(len(layout.num_clusters), 1)
    for row, k in zip(sizes.unbind(), layout.num_clusters, strict=True):
        row.fill_(k)
    return sizes


def _closed_contrast(
    layout: Layout,
    options: Contrast,
    grams: Tensor,
    squares: Tensor,
    sizes: Tensor | int,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and what its gradient needs."""
    norms = _inverse_norms(layout, squares)
    firsts, seconds = norms.chunk(2)
    firsts = firsts / options.temperature
    exponentials = torch.empty_like(grams)
    by_row, by_column = [], []
    for start, gram, first, part in _tiles(grams, firsts, exponentials):
        torch.mul(gram, first.unsqueeze(3), out=part).mul_(seconds.unsqueeze(2))
        for block in layout.blocks(part) if layout.is_filled else [part]:
            block.exp_()
        if not options.positive_in_denominator:
            part.diagonal(start, 2, 3).zero_()
        by_row.append(part.sum(3))
        by_column.append(part.sum(2) if options.symmetric else by_row[-1])
    rows = torch.cat(by_row, 2)
    columns = reduce(torch.add, by_column) if options.symmetric else rows
    if layout.is_filled:
        rows, columns = (torch.threshold(sums, 0, 1) for sums in (rows, columns))
    # Half of the mean over clusters and pairs, for each direction.
    weight = 0.5 / (layout.pairs * sizes)
    positive = grams.diagonal(0, 2, 3) * firsts * seconds
    loss = (rows * columns).log_().sub_(positive, alpha=2).mul_(weight).sum()
    # dL/dS is softmax over rows (and over columns) minus the identity.
    row_weights, column_weights = weight / rows, weight / columns
    if not options.symmetric:
        row_weights, column_weights = row_weights.mul_(2), column_weights.zero_()
    at_positive = (firsts * seconds).mul_(2 * weight)
    return loss, (exponentials, row_weights, column_weights, at_positive, norms, firsts)


def _contrast_gradients(
    layout: Layout, grams: Tensor, saved: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the Gram matrices and of the squared norms."""
    exponentials, row_weights, column_weights, at_positive, norms, firsts = saved[:6]
    seconds = norms[layout.pairs :] * grad
    # S_kj is the Gram matrix times f_k s_j, inverse norms over τ, and so dL/dS_kj times f_k s_j its
    # gradient.
    row_weights, column_weights = row_weights * firsts, column_weights * seconds
    at_positive = at_positive * grad
    grad_grams = torch.empty_like(grams)
    by_row, by_column = [], []
    for start, gram, first, exponential, at_row, own, part in _tiles(
        grams, firsts, exponentials, row_weights, at_positive, grad_grams
    ):
        torch.mul(at_row.unsqueeze(3), seconds.unsqueeze(2), out=part)
        part.addcmul_(first.unsqueeze(3), column_weights.unsqueeze(2)).mul_(exponential)
        part.diagonal(start, 2, 3).sub_(own)
        # Through the norms: S falls with ‖c‖, and Σ_j dL/dS_kj S_kj is what a Gram matrix times
        # its gradient sums up to.
        product = part * gram
        by_row.append(product.sum(3))
        by_column.append(product.sum(2))
    grad_squares = torch.cat([torch.cat(by_row, 2), reduce(torch.add, by_column)])
    return grad_grams, grad_squares.mul_(norms).mul_(norms).mul_(-0.5)


def _tiles(*arrays: Tensor) -> Iterable[Any]:
    """Split (pairs, heads, K, …) arrays into rows to work on at once, each with its first row."""
    pairs, heads, k = arrays[0].shape[:3]
    rows = max(1, _TILE // (pairs * k))
    if rows >= k or heads > 1 or arrays[0].device.type != "cpu":
        return [(0, *arrays)]
    return zip(range(0, k, rows), *(torch.split(array, rows, 2) for array in arrays), strict=True)


def _closed_balance(masses: Tensor, sizes: Tensor | int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss and its gradient."""
    total = torch.threshold(masses.sum(dim=2, keepdim=True), SMALLEST_MASS, torch.inf)
    share = masses / total
    ratio = share * sizes
    floored = ratio.clamp_min(SMALLEST_RATIO)
    log = floored.log()
    gap = (share * log).sum(dim=2, keepdim=True)
    slope = torch.addcdiv(log, ratio, floored).sub_(gap + 1).div_(total * len(masses))
    return gap.clamp_min(0).sum() / len(masses), (slope,)
