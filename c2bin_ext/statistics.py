"""Sums over instances: all that C2BIN's losses need of a batch, and the only n x K work in them.

Cosines of predictions with targets, their count, cluster masses, Gram matrices of batch-wise
cluster assignment vectors and their squared norms are sums over instances. So the loss of more
instances than are at hand, those of other ranks or of other micro-batches, needs no features of
theirs, only their sums: O(K²) numbers a head, whatever the number of instances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from c2bin_ext._numerics import (
    at_least_float32,
    is_eager,
    smallest_square,
    unit_rows,
    without_autocast,
)

__all__ = ["BatchStatistics", "HeadStatistics", "at_value_of"]


def at_value_of(own: Tensor, total: Tensor) -> Tensor:
    """Return the value of `total` with the gradient of `own`.

    Formula: `own + sg(total - own)`, with `sg` the stop-gradient.

    Args:
        own: sums over the instances at hand, any shape.
        total: sums over more instances, of the same shape.

    Returns:
        A tensor of that shape.

    Examples:
        >>> import torch
        >>> from c2bin_ext.statistics import at_value_of
        >>> own = torch.tensor(2.0, requires_grad=True)
        >>> at_value_of(own, torch.tensor(5.0)) ** 2
        tensor(25., grad_fn=<PowBackward0>)
    """
    return own + (total - own).detach()


class Layout(NamedTuple):
    """Which sums there are of a group of heads, each filled up to the K of the largest.

    Attributes:
        num_clusters: K of each head.
        views: how many views of the runner there are, whose masses are summed.
        pairs: how many pairs of assignments each head contrasts.
        floors: of the firsts of the pairs, then of the seconds, the squared norm up to which a
            column counts as empty; none for dot products, which need no norms.
    """

    num_clusters: tuple[int, ...]
    views: int
    pairs: int
    floors: tuple[float, ...]

    @property
    def is_filled(self) -> bool:
        """Whether a head is smaller than another, and so filled up with empty clusters."""
        return len(set(self.num_clusters)) > 1

    def own(self, sums: Tensor, head: int) -> Tensor:
        """Return a view of what is one head's, without what it is filled up with."""
        own = sums.select(1, head)
        for dim in range(1, own.ndim):
            own = own.narrow(dim, 0, self.num_clusters[head])
        return own

    def parts(self, sums: Tensor) -> list[Tensor]:
        """Return what is each head's own, view by view or pair by pair, of sums without graph."""
        each, *shape = sums.shape
        strides, start, views = sums.stride(), sums.storage_offset(), []
        for k in self.num_clusters * each:
            views.append(sums.as_strided((k,) * (len(shape) - 1), strides[2:], start))
            start += strides[1]
        return views


class HeadStatistics(NamedTuple):
    """The sums of one group of heads, each filled up with empty clusters to the K of the largest.

    Small heads make one group: they share operators, whose launches cost more than empty clusters.

    Attributes:
        grams: `C'ᵀC''` of every pair that is contrasted, (pairs, heads, K, K).
        masses: `Σ_i P[i, k]` of the runner's views, (views, heads, K).
        squares: `‖c_k‖²` of the firsts of the pairs, then of the seconds, (2 pairs, heads, K).
        layout: which sums these are.
        heads: the assignments, view by view, whose gradient the formulas then write in closed form;
            none where autograd follows the sums.
        scale: what the sums' gradient is multiplied with, if the values are those of a total.
    """

    grams: Tensor
    masses: Tensor
    squares: Tensor
    layout: Layout
    heads: tuple[Tensor, ...] = ()
    scale: float | None = None

    def parts(self) -> list[Tensor]:
        """Return views of the sums of each head alone: of every head those of each kind."""
        return [
            part
            for head in range(len(self.layout.num_clusters))
            for part in (self.layout.own(kind, head) for kind in self[:3])
        ]


def joined(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return grams, masses and squares of what `HeadStatistics.parts` returns."""
    most = max(part.shape[-1] for part in parts)
    padded = [pad(part, [0, most - part.shape[-1]] * (part.ndim - 1)) for part in parts]
    grams, masses, squares = (torch.stack(padded[kind::3], dim=1) for kind in range(3))
    return grams, masses, squares


@dataclass
class BatchStatistics:
    """The sums over instances of one batch.

    Attributes:
        cosines: `Σ_i cos(p_i, z_i)` of every direction of Eq. 1, (directions,).
        count: the number of instances n.
        groups: the sums of all heads.
    """

    cosines: Tensor
    count: int | Tensor
    groups: list[HeadStatistics]

    @classmethod
    def of(
        cls,
        aligned: Sequence[tuple[Tensor, Tensor]] = (),
        views: Sequence[Sequence[Tensor]] = (),
        fixed: Sequence[Sequence[Tensor]] = (),
        *,
        contrast: str = "",
        balance: bool = True,
        closed_form: bool = False,
    ) -> BatchStatistics:
        """Sum over the instances at hand.

        Args:
            aligned: predictions and their targets, each (n, d); targets get no gradient.
            views: of every view of the runner, the assignments (n, K) of each head.
            fixed: likewise of the follower, which gets no gradient: each of the runner's views is
                contrasted with the follower's other one instead of with the runner's.
            contrast: `"cosine"`, `"dot"`, or nothing, for masses alone.
            balance: whether to sum the masses of the runner's views.
            closed_form: leave the gradient of the heads to `_formulas.cluster_terms`, which has it
                in closed form. Compiled, under `torch.func` and in forward mode autograd follows
                the sums all the same.

        Returns:
            The sums, with the gradient of predictions and, unless `closed_form`, of assignments.
        """
        cosines = [_cosine_sum(prediction, target) for prediction, target in aligned]
        everyone = [*views, *([head.detach() for head in view] for view in reversed(fixed))]
        floors = tuple(smallest_square(view[0].dtype) for view in everyone)
        sizes = [head.shape[1] for head in views[0]] if views else []
        small = [head for head, k in enumerate(sizes) if k <= _SMALL]
        groups = [[head] for head, k in enumerate(sizes) if k > _SMALL]
        groups = [small, *groups] if small else groups
        own = aligned[0][0] if aligned else views[0][0]
        return cls(
            torch.stack(cosines) if cosines else at_least_float32(own)[0].new_empty(0),
            own.shape[0],
            [
                _group(
                    [[view[head] for head in heads] for view in everyone],
                    views=len(views) if balance else 0,
                    pairs=len(everyone) // 2 if contrast else 0,
                    floors=floors if contrast == "cosine" else (),
                    closed_form=closed_form,
                )
                for heads in groups
            ],
        )

    def mass(self) -> Tensor:
        """The mass of all clusters together: n for every view and head, of rows that sum to 1."""
        return reduce(torch.add, (group.masses.detach().sum() for group in self.groups))

    def flat(self) -> Tensor:
        """Return all sums in one vector, which ranks and micro-batches add up."""
        return torch.cat([part.reshape(-1) for part in self._parts()])

    def at(self, total: Tensor, scale: float = 1.0) -> BatchStatistics:
        """Return these statistics with the sums of `total`, a vector as `flat` returns.

        Its derivative by the batch's own sums is `scale`.
        """
        parts = self._parts()
        split = torch.split(total, [part.numel() for part in parts])
        cosines, count, *sums = (
            new.view(old.shape).to(old.dtype) for new, old in zip(split, parts, strict=True)
        )
        groups = []
        for group in self.groups:
            size = 3 * len(group.layout.num_clusters)
            groups.append(HeadStatistics(*joined(sums[:size]), *group[3:5], scale))
            sums = sums[size:]
        return BatchStatistics(cosines, count, groups)

    def _parts(self) -> list[Tensor]:
        count = self.count
        if not isinstance(count, Tensor):
            count = self.cosines.new_full((), count)
        return [self.cosines, count, *(part for group in self.groups for part in group.parts())]


# Heads of up to so many clusters share operators.
_SMALL = 256


def _cosine_sum(prediction: Tensor, target: Tensor) -> Tensor:
    dtypes = prediction.dtype, target.dtype
    prediction, target = at_least_float32(prediction, target.detach())
    return (unit_rows(prediction, dtypes[0]) * unit_rows(target, dtypes[1])).sum()


def _group(
    everyone: list[list[Tensor]],
    views: int,
    pairs: int,
    floors: tuple[float, ...],
    closed_form: bool,
) -> HeadStatistics:
    layout = Layout(tuple(head.shape[1] for head in everyone[0]), views, pairs, floors)
    heads = at_least_float32(*(head for view in everyone for head in view))
    if closed_form and is_eager(*heads):
        with torch.no_grad():
            return HeadStatistics(*_closed(layout, heads), layout, heads)
    return HeadStatistics(*joined(sums_of(layout, *heads)), layout)


def sums_of(layout: Layout, *heads: Tensor) -> list[Tensor]:
    """Gram matrices, masses and squared norms: what autograd, compilers and torch.func follow.

    Heads come view by view: the firsts of the pairs, then the seconds.
    """
    each, pairs, parts = len(layout.num_clusters), layout.pairs, []
    for head, k in enumerate(layout.num_clusters):
        views = heads[head::each]
        empty = views[0].new_empty(0, k)
        with without_autocast(empty):
            grams = [views[pair].T @ views[pairs + pair] for pair in range(pairs)]
        masses = [view.sum(dim=0) for view in views[: layout.views]]
        squares = [(view * view).sum(dim=0) for view in views[: len(layout.floors)]]
        parts += [
            torch.stack(grams) if grams else empty[:, None].expand(0, k, k),
            torch.stack(masses) if masses else empty,
            torch.stack(squares) if squares else empty,
        ]
    return parts


def _closed(layout: Layout, heads: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `sums_of` does, joined, with no graph."""
    each, pairs, most = len(layout.num_clusters), layout.pairs, max(layout.num_clusters)
    new = heads[0].new_zeros if layout.is_filled else heads[0].new_empty
    grams = new((pairs, each, most, most))
    rows = new((layout.views + len(layout.floors), each, most))
    blocks, parts = layout.parts(grams), layout.parts(rows)
    masses, squares = parts[: layout.views * each], parts[layout.views * each :]
    for head in range(each):  # one by one, while caches hold its assignments
        views = heads[head::each]
        for own, mass in zip(views, masses[head::each], strict=False):
            torch.sum(own, 0, out=mass)
        for own, square in zip(views, squares[head::each], strict=False):
            torch.sum(own * own, 0, out=square)
        for own, other, gram in zip(views, views[pairs:], blocks[head::each], strict=False):
            # Autocast leaves products alone that are told where to write.
            torch.mm(own.T, other, out=gram)
    return grams, *rows.split_with_sizes([layout.views, len(layout.floors)])  # type: ignore[return-value]


def gradients(
    layout: Layout,
    heads: Sequence[Tensor],
    needed: Sequence[bool],
    *slopes: Tensor | None,
    scale: float,
) -> list[Tensor | None]:
    """Return the heads' gradients from those of grams and masses, and -2 times those of squares.

    `scale` is what those of grams and squares are still to be multiplied with.
    """
    count, half = len(heads), layout.pairs * len(layout.num_clusters)
    grams, masses, squares = ([] if kind is None else layout.parts(kind) for kind in slopes)
    found: list[Tensor | None] = [None] * count
    for at in sorted(range(count), key=lambda at: at % len(layout.num_clusters)):
        if not needed[at]:
            continue
        own, grad = heads[at], masses[at] if at < len(masses) else None
        if squares:
            # One pass over n x K entries, which the product then adds to.
            grad = own.new_zeros(()) if grad is None else grad
            grad = torch.addcmul(grad, own, squares[at], value=-scale)
        if grams:
            gram = grams[at % half]
            factors = heads[(at + half) % count], gram.T if at < half else gram
            out = grad if squares and grad is not None else torch.empty_like(own)
            base, beta = (out, 0) if grad is None else (grad, 1)
            grad = torch.addmm(base, *factors, beta=beta, alpha=scale, out=out)
        found[at] = grad if grad is None or grad.ndim == 2 else grad.expand_as(own)
    return found
