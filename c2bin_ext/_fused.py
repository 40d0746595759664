"""The two cluster terms with closed-form gradients, for eager training steps.

Autograd of the formulas in `functional` walks several times through every n x K and K x K
intermediate, and pays the overhead of some forty small kernels a head. Here the backward pass turns
the one K x K matrix of exponentials into the gradient of the logits. Values and gradients are those
of `functional`, whose formulas serve whatever these cannot: compilation, `torch.func`, forward-mode
derivatives, other similarities, statistics over ranks. Each takes that formula as its last
argument: with `create_graph=True` (the only case in which gradients are enabled inside `backward`)
the gradient is autograd's of the formula, so that second derivatives are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from c2bin_ext._numerics import (
    SMALLEST_MASS,
    SMALLEST_RATIO,
    inverse_norm,
    is_compiling,
    without_autocast,
)

# exp(S) is taken without subtracting a maximum first. Cosines are at most 1, so that S is at most
# 1/τ, and sums of exp(30) stay far inside float32, as do their inverses.
MIN_TEMPERATURE = 1 / 30

# Torch releases that lack it switch autocast off every time.
_is_any_autocast_enabled = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_AS_IT_IS = nullcontext()


def usable(*tensors: Tensor) -> bool:
    """Tell whether this is an eager, reverse-mode step, the only kind served here."""
    return not (
        is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (forward_ad._current_level >= 0 and any(_tangent(t) is not None for t in tensors))
    )


def _tangent(tensor: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent


def _full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    # Switching autocast off where it is off already costs more than the product of a small head.
    return without_autocast(tensor) if _is_any_autocast_enabled() else _AS_IT_IS


def cosine_contrast(
    assignments0: Tensor,
    assignments1: Tensor,
    temperature: float,
    positive_in_denominator: bool,
    symmetric: bool,
    floors: tuple[float, float],
    formula: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Eq. 4 with cosine similarity: `functional.bca_contrastive_loss`.

    `floors` are the squared norms, one a view, up to which a column counts as empty.
    """
    loss: Tensor = _CosineContrast.apply(
        *(assignments0, assignments1, temperature, positive_in_denominator, symmetric),
        *(floors, formula),
    )
    return loss


def balance_gaps(masses: Sequence[Tensor], formula: Callable[..., Tensor]) -> Tensor:
    """Eq. 5 as log K - H, summed over heads: `functional.cluster_entropy_regularizer`."""
    # Rows of one buffer cost more than they save where there is one.
    terms = _BalanceGap if len(masses) == 1 else _BalanceGaps
    loss: Tensor = terms.apply(formula, *masses)
    return loss


def _differentiate(
    needed: Sequence[bool], formula: Callable[..., Tensor], grad: Tensor, *tensors: Tensor
) -> list[Tensor | None]:
    # Aliases: one view can be computed from the other, or be the same tensor, and the derivative
    # by each must not pass through the other.
    aliases = [tensor.view_as(tensor) for tensor in tensors]
    wanted = [alias for alias, need in zip(aliases, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(formula(*aliases), wanted, grad, create_graph=True))
    return [next(grads) if need else None for need in needed]


class _CosineContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        assignments0: Tensor,
        assignments1: Tensor,
        temperature: float,
        positive_in_denominator: bool,
        symmetric: bool,
        floors: tuple[float, float],
        formula: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        inverse0 = inverse_norm((assignments0 * assignments0).sum(dim=0), floors[0])
        inverse1 = inverse_norm((assignments1 * assignments1).sum(dim=0), floors[1])
        unit0, unit1 = assignments0 * inverse0, assignments1 * inverse1
        with _full_precision(assignments0):
            # beta = 0 ignores the first operand: this is the product divided by τ in one pass.
            logits = torch.addmm(inverse1, unit0.T, unit1, beta=0, alpha=1 / temperature)
        positive = logits.trace()
        exponentials = logits.exp_()
        if not positive_in_denominator:
            exponentials.fill_diagonal_(0)
        rows = exponentials.sum(dim=1)
        columns = exponentials.sum(dim=0) if symmetric else rows
        ctx.save_for_backward(
            *(assignments0, assignments1, unit0, unit1, inverse0, inverse1),
            *(exponentials, rows, columns),
        )
        ctx.options = (temperature, symmetric, formula)
        logs = (rows * columns).log_().sum()
        return logs.sub_(positive, alpha=2).div_(2 * exponentials.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        temperature, symmetric, formula = ctx.options
        assignments0, assignments1, *saved = ctx.saved_tensors
        unit0, unit1, inverse0, inverse1, exponentials, rows, columns = saved
        if torch.is_grad_enabled():
            views, needed = (assignments0, assignments1), ctx.needs_input_grad[:2]
            return *_differentiate(needed, formula, grad, *views), *[None] * 5
        # dL/dS = softmax over rows (and over columns) minus the identity, averaged over clusters.
        # The average and 1/τ are left to the products: there a factor costs nothing.
        if symmetric:
            grad_logits = torch.add((grad / rows)[:, None], grad / columns).mul_(exponentials)
        else:
            grad_logits = exponentials * (grad / rows)[:, None]
        ways = 2 if symmetric else 1
        grad_logits.diagonal().sub_(grad, alpha=ways)
        scale = 1 / (ways * exponentials.shape[0] * temperature)
        grad0 = grad1 = None
        # Through the normalisation: the part along the unit column drops out.
        with _full_precision(unit0):
            if ctx.needs_input_grad[0]:
                grad0 = torch.addmm(inverse0, unit1, grad_logits.T, beta=0, alpha=scale)
                grad0.addcmul_(unit0, (grad0 * unit0).sum(dim=0), value=-1).mul_(inverse0)
            if ctx.needs_input_grad[1]:
                grad1 = torch.addmm(inverse1, unit0, grad_logits, beta=0, alpha=scale)
                grad1.addcmul_(unit1, (grad1 * unit1).sum(dim=0), value=-1).mul_(inverse1)
        return grad0, grad1, None, None, None, None, None


class _BalanceGap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Callable[..., Tensor], mass: Tensor) -> Tensor:
        total = torch.threshold(mass.sum(), SMALLEST_MASS, torch.inf)
        share = mass / total
        clusters = share.shape[0]
        # K ŝ: adding a multiple is one kernel, multiplying by a number makes a tensor of it first.
        ratio = torch.add(share, share, alpha=clusters - 1).clamp_min_(SMALLEST_RATIO)
        log = ratio.log()
        if ctx.needs_input_grad[1]:
            slope = torch.addcdiv(log, share, ratio, value=clusters)
            slope = slope.sub_(torch.dot(slope, share)).div_(total)
            ctx.save_for_backward(mass, slope)
            ctx.formula = formula
        return torch.dot(share, log).clamp_min_(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mass, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *_differentiate([True], ctx.formula, grad, mass)
        # Not in place: with batched gradients `grad` has a dimension more than `slope`.
        return None, slope * grad


class _BalanceGaps(torch.autograd.Function):
    """The same of several heads with shared kernels: at the usual sizes, launches cost most.

    Each is a row of one matrix, filled up with empty clusters, which add nothing to the entropy.
    """

    @staticmethod
    def forward(ctx: Any, formula: Callable[..., Tensor], *masses: Tensor) -> Tensor:
        sizes = [mass.shape[0] for mass in masses]
        rows = masses[0].new_zeros(len(sizes), max(sizes))
        for row, mass, k in zip(rows.unbind(), masses, sizes, strict=True):
            row[:k].copy_(mass)
        clusters = rows.new_empty(len(sizes), 1)
        start = 0
        for k, same in groupby(sizes):
            stop = start + len(list(same))
            clusters[start:stop].fill_(k)
            start = stop
        total = torch.threshold(rows.sum(dim=1, keepdim=True), SMALLEST_MASS, torch.inf)
        share = rows / total
        ratio = share * clusters  # K ŝ
        floored = ratio.clamp_min(SMALLEST_RATIO)
        log = floored.log()
        if any(ctx.needs_input_grad):
            slope = torch.addcdiv(log, ratio, floored)
            slope.sub_((slope * share).sum(dim=1, keepdim=True)).div_(total)
            ctx.save_for_backward(*masses, slope)
            ctx.formula = formula
        return (share * log).sum(dim=1).clamp_min_(0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *masses, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[1:]
            return None, *_differentiate(needed, ctx.formula, grad, *masses)
        rows = (slope * grad).unbind()
        return None, *(row[: len(mass)] for row, mass in zip(rows, masses, strict=True))
