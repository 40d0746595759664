"""Sums over instances: all that C2BIN's losses need of a batch, and the only n x K work in them.

Cosines of predictions with targets, their count, cluster masses, Gram matrices of batch-wise
cluster assignment vectors and their squared norms are sums over instances. So the loss of more
instances than are at hand, those of other ranks or of other micro-batches, needs no features of
theirs, only their sums: O(K²) numbers a head, whatever the number of instances.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from c2bin_ext._numerics import (
    at_least_float32,
    differentiate,
    is_eager,
    needs_formula,
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


class HeadStatistics(NamedTuple):
    """What the cluster terms need of one head; a pair is two assignments that are contrasted.

    Attributes:
        grams: `C'ᵀC''` of every pair, (pairs, K, K).
        masses: `Σ_i P[i, k]` of the runner's views, (views, K).
        squares: `‖c_k‖²` of the first of every pair, then of the second, (2 pairs, K); no rows for
            dot products.
    """

    grams: Tensor
    masses: Tensor
    squares: Tensor


class Layout(NamedTuple):
    """Which sums there are, and where the entries of each head stand among those of all.

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
    def spans(self) -> list[slice]:
        """Where the clusters of each head are among those of all."""
        ends = [*accumulate(self.num_clusters)]
        return [slice(end - k, end) for end, k in zip(ends, self.num_clusters, strict=True)]

    def blocks(self, grams: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Go through the Gram matrices of all heads, or something as long, head by head.

        Returns:
            Of every head its entries, (pairs, K, K), and where its clusters are among all.
        """
        start = 0
        for clusters, span in zip(self.num_clusters, self.spans, strict=True):
            stop = start + self.pairs * clusters**2
            yield grams[start:stop].view(self.pairs, clusters, clusters), span
            start = stop


@dataclass(frozen=True)
class BatchStatistics:
    """The sums over instances of one batch; heads lie side by side, so that they share operators.

    Attributes:
        cosines: `Σ_i cos(p_i, z_i)` of every direction of Eq. 1, (directions,).
        count: the number of instances n.
        grams: Gram matrices of all heads one after another, those of all pairs of a head together.
        masses: cluster masses of the runner's views, (views, ΣK).
        squares: squared norms of all columns: firsts of the pairs, then seconds, (2 pairs, ΣK).
        layout: which sums these are.
    """

    cosines: Tensor
    count: int | Tensor
    grams: Tensor
    masses: Tensor
    squares: Tensor
    layout: Layout

    @classmethod
    def of(
        cls,
        aligned: Sequence[tuple[Tensor, Tensor]] = (),
        views: Sequence[Sequence[Tensor]] = (),
        fixed: Sequence[Sequence[Tensor]] = (),
        *,
        contrast: str = "",
    ) -> BatchStatistics:
        """Sum over the instances at hand.

        Args:
            aligned: predictions and their targets, each (n, d); targets get no gradient.
            views: of every view of the runner, the assignments (n, K) of each head.
            fixed: likewise of the follower, which gets no gradient: each of the runner's views is
                contrasted with the follower's other one instead of with the runner's.
            contrast: `"cosine"`, `"dot"`, or nothing, for masses alone.

        Returns:
            The sums, with the gradient of the assignments and of the predictions.
        """
        cosines = [_cosine_sum(prediction, target) for prediction, target in aligned]
        everyone = [*views, *([head.detach() for head in view] for view in reversed(fixed))]
        layout = Layout(
            num_clusters=tuple(head.shape[1] for head in views[0]) if views else (),
            views=len(views),
            pairs=len(everyone) // 2 if contrast else 0,
            floors=tuple(smallest_square(view[0].dtype) for view in everyone)
            if contrast == "cosine"
            else (),
        )
        heads = at_least_float32(*(head for view in everyone for head in view))
        if heads:
            sums = _Sums.apply if is_eager(*heads) else _formula
            grams, masses, squares = sums(layout, *heads)
        else:
            grams = masses = squares = cosines[0].new_empty(0)
        return cls(
            torch.stack(cosines) if cosines else masses.new_empty(0),
            len(heads[0] if heads else aligned[0][0]),
            grams,
            masses,
            squares,
            layout,
        )

    @property
    def heads(self) -> tuple[HeadStatistics, ...]:
        """The sums of every head, as views."""
        return tuple(
            HeadStatistics(grams, self.masses[:, clusters], self.squares[:, clusters])
            for grams, clusters in self.layout.blocks(self.grams)
        )

    def flat(self) -> Tensor:
        """Return all sums in one vector, which ranks and micro-batches add up."""
        return torch.cat([part.reshape(-1) for part in self._parts()])

    def at(self, total: Tensor) -> BatchStatistics:
        """Return these statistics with the sums of `total`, a vector as `flat` returns."""
        parts = self._parts()
        split = torch.split(total, [part.numel() for part in parts])
        cosines, count, grams, masses, squares = (
            new.view_as(old).to(old.dtype) for new, old in zip(split, parts, strict=True)
        )
        return BatchStatistics(cosines, count, grams, masses, squares, self.layout)

    def _parts(self) -> list[Tensor]:
        count = self.count
        if not isinstance(count, Tensor):
            count = self.masses.new_full((), count)
        return [self.cosines, count, self.grams, self.masses, self.squares]


def _cosine_sum(prediction: Tensor, target: Tensor) -> Tensor:
    dtypes = prediction.dtype, target.dtype
    prediction, target = at_least_float32(prediction, target.detach())
    return (unit_rows(prediction, dtypes[0]) * unit_rows(target, dtypes[1])).sum()


Sums = tuple[Tensor, Tensor, Tensor]


def _formula(layout: Layout, *heads: Tensor) -> Sums:
    """Gram matrices, masses and squared norms: what autograd, compilers and torch.func follow."""
    each, pairs = len(layout.num_clusters), layout.pairs
    views = [torch.cat(heads[i : i + each], dim=1) for i in range(0, len(heads), each)]
    masses = torch.stack([view.sum(dim=0) for view in views[: layout.views]])
    grams, squares = masses.new_empty(0), masses.new_empty(0, masses.shape[1])
    if pairs:
        firsts, seconds = heads[: pairs * each], heads[pairs * each :]
        with without_autocast(heads[0]):
            grams = torch.cat(
                [
                    (firsts[p * each + h].T @ seconds[p * each + h]).reshape(-1)
                    for h in range(each)
                    for p in range(pairs)
                ]
            )
    if layout.floors:
        squares = torch.stack([(view * view).sum(dim=0) for view in views])
    return grams, masses, squares


class _Sums(torch.autograd.Function):
    """`_formula` with the gradient in closed form: one product and two additions a matrix."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, *heads: Tensor) -> Sums:
        each, pairs = len(layout.num_clusters), layout.pairs
        ctx.save_for_backward(*heads)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        # Of all heads and views at once: at the usual sizes, launches cost most.
        columns = torch.cat(heads, dim=1)
        every = columns.shape[1] // sum(layout.num_clusters)
        masses = columns.view(len(columns), every, -1)[:, : layout.views].sum(dim=0)
        squares = columns.new_empty(0, masses.shape[1])
        if layout.floors:
            squares = columns.mul_(columns).sum(dim=0).view(every, -1)
        grams = columns.new_empty(pairs * sum(k**2 for k in layout.num_clusters))
        firsts, seconds = heads[: pairs * each], heads[pairs * each :]
        # Autocast leaves products alone that are told where to write.
        for h, (block, _) in enumerate(layout.blocks(grams)):
            for p, gram in enumerate(block):
                torch.mm(firsts[p * each + h].T, seconds[p * each + h], out=gram)
        return grams, masses, squares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layout, heads = ctx.layout, ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if needs_formula():
            return None, *differentiate(lambda *x: _formula(layout, *x), heads, needed, grads)
        each, pairs, (grams, masses, squares) = len(layout.num_clusters), layout.pairs, grads
        blocks = [] if grams is None else [block for block, _ in layout.blocks(grams)]
        found: list[Tensor | None] = []
        for i, (own, need) in enumerate(zip(heads, needed, strict=True)):
            view, head = divmod(i, each)
            clusters = layout.spans[head]
            grad = None if masses is None or not need else masses[view, clusters].expand_as(own)
            if blocks and need:
                gram, other = blocks[head][view % pairs], heads[(i + pairs * each) % len(heads)]
                factors = (other, gram.T if view < pairs else gram)
                out = torch.empty_like(own, memory_format=torch.contiguous_format)
                # With the masses' gradient as the bias of the product.
                product = torch.mm if grad is None else partial(torch.addmm, grad)
                grad = product(*factors, out=out)
                if squares is not None:
                    grad.addcmul_(own, squares[view, clusters], value=2)
            found.append(grad)
        return None, *found
