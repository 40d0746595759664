"""Sums over instances: all that C2BIN's losses need of a batch, and the only n x K work in them.

Cosines of predictions with targets, their count, cluster masses, Gram matrices of batch-wise
cluster assignment vectors and their squared norms are sums over instances. So the loss of more
instances than are at hand, those of other ranks or of other micro-batches, needs no features of
theirs, only their sums: O(K²) numbers a head, whatever the number of instances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from c2bin_ext._numerics import (
    at_least_float32,
    differentiate,
    is_eager,
    smallest_square,
    unit_rows,
    wants_formula,
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

    def rows(self, sums: Tensor) -> Sequence[Tensor]:
        """Return views of the masses, or of the squares, of each view and head."""
        most = sums.shape[-1]
        sizes = [size for k in self.num_clusters for size in (k, most - k)]
        return sums.reshape(-1).split_with_sizes(sizes * len(sums))[::2]

    def blocks(self, grams: Tensor) -> list[Tensor]:
        """Return views of the Gram matrices of each pair and head."""
        blocks = grams.flatten(0, 1).unbind()
        sizes = self.num_clusters * self.pairs
        return [block[:k, :k] for block, k in zip(blocks, sizes, strict=True)]


class HeadStatistics(NamedTuple):
    """The sums of one group of heads, each filled up with empty clusters to the K of the largest.

    Small heads make one group: they share operators, whose launches cost more than empty clusters.

    Attributes:
        grams: `C'ᵀC''` of every pair that is contrasted, (pairs, heads, K, K).
        masses: `Σ_i P[i, k]` of the runner's views, (views, heads, K).
        squares: `‖c_k‖²` of the firsts of the pairs, then of the seconds, (2 pairs, heads, K).
        layout: which sums these are.
    """

    grams: Tensor
    masses: Tensor
    squares: Tensor
    layout: Layout

    def parts(self) -> list[Tensor]:
        """Return views of the sums of each head alone: of every head those of each kind."""
        return [
            part
            for head in range(len(self.layout.num_clusters))
            for part in (self.layout.own(kind, head) for kind in self[:3])
        ]

    @classmethod
    def joined(cls, parts: Sequence[Tensor], layout: Layout) -> HeadStatistics:
        """Make statistics of what `parts` returns."""
        most = max(layout.num_clusters)
        padded = [pad(part, [0, most - part.shape[-1]] * (part.ndim - 1)) for part in parts]
        grams, masses, squares = (torch.stack(padded[kind::3], dim=1) for kind in range(3))
        return cls(grams, masses, squares, layout)


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
    ) -> BatchStatistics:
        """Sum over the instances at hand.

        Args:
            aligned: predictions and their targets, each (n, d); targets get no gradient.
            views: of every view of the runner, the assignments (n, K) of each head.
            fixed: likewise of the follower, which gets no gradient: each of the runner's views is
                contrasted with the follower's other one instead of with the runner's.
            contrast: `"cosine"`, `"dot"`, or nothing, for masses alone.
            balance: whether to sum the masses of the runner's views.

        Returns:
            The sums, with the gradient of the assignments and of the predictions.
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

    def at(self, total: Tensor) -> BatchStatistics:
        """Return these statistics with the sums of `total`, a vector as `flat` returns."""
        parts = self._parts()
        split = torch.split(total, [part.numel() for part in parts])
        cosines, count, *sums = (
            new.view(old.shape).to(old.dtype) for new, old in zip(split, parts, strict=True)
        )
        groups = []
        for group in self.groups:
            size = 3 * len(group.layout.num_clusters)
            groups.append(HeadStatistics.joined(sums[:size], group.layout))
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
    everyone: list[list[Tensor]], views: int, pairs: int, floors: tuple[float, ...]
) -> HeadStatistics:
    layout = Layout(tuple(head.shape[1] for head in everyone[0]), views, pairs, floors)
    heads = at_least_float32(*(head for view in everyone for head in view))
    if is_eager(*heads):
        grams, masses, squares = _Sums.apply(layout, *heads)
        return HeadStatistics(grams, masses, squares, layout)
    return HeadStatistics.joined(_formula(layout, *heads), layout)


def _formula(layout: Layout, *heads: Tensor) -> list[Tensor]:
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


class _Sums(torch.autograd.Function):
    """`_formula` with the gradient in closed form: one addition and one product a matrix."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, *heads: Tensor) -> tuple[Tensor, ...]:
        each, pairs, most = len(layout.num_clusters), layout.pairs, max(layout.num_clusters)
        ctx.save_for_backward(*heads)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        new = heads[0].new_zeros if layout.is_filled else heads[0].new_empty
        grams = new((pairs, each, most, most))
        masses = new((layout.views, each, most))
        squares = new((len(layout.floors), each, most))
        for own, mass in zip(heads, layout.rows(masses), strict=False):
            torch.sum(own, 0, out=mass)
        for own, square in zip(heads, layout.rows(squares), strict=False):
            torch.sum(own * own, 0, out=square)
        for own, other, gram in zip(
            heads, heads[pairs * each :], layout.blocks(grams), strict=False
        ):
            # Autocast leaves products alone that are told where to write.
            torch.mm(own.T, other, out=gram)
        return grams, masses, squares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layout, heads, needed = ctx.layout, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if wants_formula(*grads):

            def formula(*heads: Tensor) -> tuple[Tensor, ...]:
                return HeadStatistics.joined(_formula(layout, *heads), layout)[:3]

            return None, *differentiate(formula, heads, needed, grads)
        count, half = len(heads), layout.pairs * len(layout.num_clusters)
        grams = [] if grads[0] is None else layout.blocks(grads[0])
        masses = () if grads[1] is None else layout.rows(grads[1])
        squares = () if grads[2] is None else layout.rows(grads[2] * 2)
        found: list[Tensor | None] = [None] * count
        for at, own in enumerate(heads):
            if not needed[at]:
                continue
            grad = masses[at] if at < len(masses) else None
            if at < len(squares):
                # One pass over n x K entries, which the product then adds to.
                square = squares[at]
                grad = own * square if grad is None else torch.addcmul(grad, own, square)
            if grams:
                gram = grams[at % half]
                factors = heads[(at + half) % count], gram.T if at < half else gram
                product = torch.mm if grad is None else partial(torch.addmm, grad)
                out = grad if at < len(squares) else torch.empty_like(own)
                grad = product(*factors, out=out)
            found[at] = grad if grad is None or grad.ndim == 2 else grad.expand_as(own)
        return None, *found
