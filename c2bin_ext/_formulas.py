"""Eq. 1, 4 and 5 from the sums over instances: K x K numbers a head, whatever the batch.

Each is a formula that autograd follows, and, for eager training steps, the same with its gradient
in closed form. Autograd of the formulas alone would walk several times through every K x K
intermediate and pay the overhead of some forty small kernels a head; in closed form all heads and
pairs share kernels, and the one matrix of exponentials becomes the gradient of the Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from c2bin_ext._numerics import (
    SMALLEST_MASS,
    SMALLEST_RATIO,
    differentiate,
    inverse_norm,
    is_readable,
    wants_formula,
)
from c2bin_ext.statistics import (
    BatchStatistics,
    HeadStatistics,
    Layout,
    at_value_of,
    gradients,
    joined,
    sums_of,
)

# From here on exp(S) is taken without subtracting a maximum first. Cosines are at most 1, so that S
# is at most 1/τ, and sums of exp(30) stay far inside float32, as do their inverses.
_MIN_TEMPERATURE = 1 / 30
# Entries of Gram matrices that are worked on at once: as many as a CPU's caches hold.
_TILE = 2**17


class Contrast(NamedTuple):
    """The options of Eq. 4."""

    temperature: float
    similarity: str
    positive_in_denominator: bool
    symmetric: bool

    @property
    def has_closed_form(self) -> bool:
        """Whether one matrix of exponentials serves a direction."""
        return self.similarity == "dot" or self.temperature >= _MIN_TEMPERATURE


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
    terms = []
    for group in statistics.groups:
        if group.heads:
            terms.append(_Terms.apply(group, options, *group.heads))
        else:
            terms.append(_terms(group.layout, options, *group[:3]))
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
    """`_terms` of the sums of heads, which it writes into, with the gradient in closed form.

    The sums' gradients are taken at once, so that of all K x K matrices one is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, group: HeadStatistics, options: Contrast | None, *heads: Tensor
    ) -> tuple[Tensor, Tensor]:
        # What second derivatives of a total need of it.
        total = () if group.scale is None else (group.grams.clone(), *group[1:3])
        terms, found = _closed(group.layout, options, group[:3], any(ctx.needs_input_grad))
        ctx.save_for_backward(*heads, *found, *total)
        ctx.layout, ctx.options, ctx.scale = group.layout, options, group.scale
        ctx.set_materialize_grads(False)
        return terms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed, scale = ctx.needs_input_grad[2:], ctx.scale
        heads, saved = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        if wants_formula(*grads):

            def formula(*heads: Tensor) -> tuple[Tensor, Tensor]:
                sums: Sequence[Tensor] = joined(sums_of(ctx.layout, *heads))
                if scale is not None:
                    pairs = zip(sums, saved[3:], strict=True)
                    sums = [at_value_of(scale * own, total) for own, total in pairs]
                return _terms(ctx.layout, ctx.options, *sums)

            return None, None, *differentiate(formula, heads, needed, grads)
        contrast, balance = (g if g is None or scale is None else g * scale for g in grads)
        grams, masses, squares, factor = None, None, None, 1.0
        if balance is not None and ctx.layout.views:
            masses = saved[1] * balance
        if contrast is not None and ctx.options is not None:
            grams, squares = saved[0], saved[2]
            if is_readable(contrast):
                factor = float(contrast)
            else:
                grams, squares = grams * contrast, squares * contrast
        found = gradients(ctx.layout, heads, needed, grams, masses, squares, scale=factor)
        return None, None, *found


def _closed(
    layout: Layout, options: Contrast | None, sums: Sequence[Tensor], wants_gradient: bool
) -> tuple[tuple[Tensor, Tensor], Sequence[Tensor]]:
    """Return both terms, and their gradients as `gradients` takes them.

    Clusters with which heads are filled up have mass, norm and S = 0. So they add nothing to H;
    exp(S) stays 0 there too, and its sums count as 1, whose logarithm is 0.
    """
    grams, masses, squares = sums
    shares, contrast, balance = _shares(layout, grams), grams.new_zeros(()), grams.new_zeros(())
    if options:
        contrast, squares = _closed_contrast(
            layout, options, grams, squares, shares, wants_gradient
        )
    if layout.views:
        balance, masses = _closed_balance(masses, shares, wants_gradient)
    found = (grams, masses, squares) if wants_gradient else ()
    return (contrast, balance), found


def _shares(layout: Layout, like: Tensor) -> Tensor | float:
    """Return 1/K of every head, (heads, 1), or the one that all have."""
    if not layout.is_filled:
        return 1 / layout.num_clusters[0]
    # Filled in: a copy from the host would wait for the GPU.
    return torch.cat([like.new_full((1, 1), 1 / k) for k in layout.num_clusters])


def _closed_contrast(
    layout: Layout,
    options: Contrast,
    grams: Tensor,
    squares: Tensor,
    shares: Tensor | float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss and -2 times its gradient by squared norms, of which dot products have none.

    Its gradient by Gram matrices is written in their place.
    """
    pairs, is_cosine = layout.pairs, bool(layout.floors)
    if options.symmetric and not is_cosine:
        # Dot products have no bound, and each direction its own largest.
        one, flipped = options._replace(symmetric=False), grams.transpose(2, 3).contiguous()
        forth, back = (
            _closed_contrast(layout, one, each, squares, shares, wants_gradient)[0]
            for each in (grams, flipped)
        )
        grams.add_(flipped.transpose(2, 3)).mul_(0.5)
        return (forth + back) * 0.5, squares
    norms = (
        _inverse_norms(layout, squares)
        if is_cosine
        else grams.new_ones(2 * pairs, *grams.shape[1:3])
    )
    firsts, seconds = norms.split_with_sizes([pairs, pairs])
    # S_kj is the Gram matrix times f_k s_j, inverse norms over τ.
    firsts, seconds = (firsts * (1 / options.temperature)).unsqueeze(3), seconds.unsqueeze(2)
    of_rows: list[Tensor] = []
    of_columns: list[Tensor] = []
    tiles = _tiles(grams, firsts)
    scratch = torch.empty_like(tiles[0][1]), torch.empty_like(tiles[0][1])
    for start, part, first in tiles:
        exponentials = scratch[0].narrow(2, 0, part.shape[2])
        part.mul_(first).mul_(seconds)
        if not is_cosine:
            # The loss does not change where a row is shifted.
            part.sub_(_largest(options, part, start))
        _exponentials(layout, options, part, start, exponentials)
        of_rows.append(exponentials.sum(3))
        if options.symmetric:
            of_columns.append(exponentials.sum(2))
    sums = torch.stack(_whole(of_rows, of_columns))
    if layout.is_filled:
        torch.threshold_(sums, 0, 1)
    # The mean over clusters, pairs and directions.
    weight = shares * (1 / (pairs * len(sums)))
    loss = sums.log().sub_(grams.diagonal(0, 2, 3)).mul_(weight).sum()
    if not wants_gradient:
        return loss, squares
    # dL/dS is softmax over rows (and over columns) minus the identity.
    by_row, *by_column = (weight / sums).unbind()
    tiles = _tiles(grams, firsts, by_row.unsqueeze(3))
    of_rows, of_columns = [], []
    for start, part, first, factor in tiles:
        exponentials, product = (array.narrow(2, 0, part.shape[2]) for array in scratch)
        if len(tiles) > 1:
            _exponentials(layout, options, part, start, exponentials)
        for column in by_column:
            factor = torch.add(factor, column.unsqueeze(2), out=product)
        exponentials.mul_(factor).diagonal(start, 2, 3).sub_(weight, alpha=len(sums))
        if is_cosine:
            # Through the norms: S falls with ‖c‖.
            torch.mul(part, exponentials, out=product)
            of_rows.append(product.sum(3))
            of_columns.append(product.sum(2))
        torch.mul(exponentials, first, out=part).mul_(seconds)
    if not is_cosine:
        return loss, squares
    return loss, torch.cat(_whole(of_rows, of_columns)).mul_(norms).mul_(norms)


def _whole(rows: list[Tensor], columns: list[Tensor]) -> list[Tensor]:
    """Return sums over rows and over columns of all tiles, the latter if there are any."""
    whole = torch.cat(rows, 2) if len(rows) > 1 else rows[0]
    return [whole, reduce(torch.add, columns)] if columns else [whole]


def _exponentials(
    layout: Layout, options: Contrast, logits: Tensor, start: int, out: Tensor
) -> None:
    """Write exp(S) of the rows from `start` on, 0 for what heads are filled up with."""
    if layout.is_filled:
        out.zero_()
        for own, block in zip(layout.parts(logits), layout.parts(out), strict=True):
            torch.exp(own, out=block)
    else:
        torch.exp(logits, out=out)
    if not options.positive_in_denominator:
        out.diagonal(start, 2, 3).zero_()


def _largest(options: Contrast, logits: Tensor, start: int) -> Tensor:
    """Return the largest S of every row, of those in its denominator."""
    if options.positive_in_denominator:
        return logits.amax(3, keepdim=True)
    negatives = logits.clone()
    negatives.diagonal(start, 2, 3).fill_(-torch.inf)
    return negatives.amax(3, keepdim=True)


def _tiles(*arrays: Tensor) -> list[Any]:
    """Split (pairs, heads, K, …) arrays into rows to work on at once, each with its first row."""
    pairs, heads, k = arrays[0].shape[:3]
    rows = max(1, _TILE // (pairs * k))
    if rows >= k or heads > 1 or arrays[0].device.type != "cpu":
        return [(0, *arrays)]
    split = (torch.split(array, rows, 2) for array in arrays)
    return list(zip(range(0, k, rows), *split, strict=True))


def _closed_balance(
    masses: Tensor, shares: Tensor | float, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient."""
    total = torch.threshold(masses.sum(dim=2, keepdim=True), SMALLEST_MASS, torch.inf)
    share = masses / total
    ratio = share / shares
    # Below, the derivative is that of a constant logarithm, 1 less.
    log = torch.threshold(ratio, SMALLEST_RATIO, SMALLEST_RATIO / math.e).log_()
    gap = (share * log).sum(dim=2, keepdim=True)
    loss = gap.clamp_min(0).sum() * (1 / len(masses))
    return loss, log.sub_(gap).div_(total * len(masses)) if wants_gradient else log
