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

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import threshold

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
        or any(_tangent(tensor) is not None for tensor in tensors)
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


def balance_gap(assignments: Tensor, formula: Callable[[Tensor], Tensor]) -> Tensor:
    """Eq. 5 as log K - H: `functional.cluster_entropy_regularizer`."""
    loss: Tensor = _BalanceGap.apply(assignments, formula)
    return loss


def _differentiate(
    ctx: Any, formula: Callable[..., Tensor], grad: Tensor, *tensors: Tensor
) -> list[Tensor | None]:
    needed = ctx.needs_input_grad[: len(tensors)]
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
        clusters = assignments0.shape[1]
        inverse0 = inverse_norm((assignments0 * assignments0).sum(dim=0), floors[0])
        inverse1 = inverse_norm((assignments1 * assignments1).sum(dim=0), floors[1])
        unit0, unit1 = assignments0 * inverse0, assignments1 * inverse1
        with _full_precision(assignments0):
            logits = torch.mm(unit0.T, unit1)
        if temperature != 1:
            logits.mul_(1 / temperature)
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
        return (rows * columns).log_().sum().sub_(positive, alpha=2).div_(2 * clusters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        temperature, symmetric, formula = ctx.options
        assignments0, assignments1, *saved = ctx.saved_tensors
        unit0, unit1, inverse0, inverse1, exponentials, rows, columns = saved
        if torch.is_grad_enabled():
            return *_differentiate(ctx, formula, grad, assignments0, assignments1), *[None] * 5
        weight = grad / (exponentials.shape[0] * temperature)
        # dL/dS = softmax over rows (and over columns) minus the identity, averaged over clusters.
        if symmetric:
            half = weight / 2
            grad_logits = torch.add((half / rows)[:, None], half / columns).mul_(exponentials)
        else:
            grad_logits = exponentials * (weight / rows)[:, None]
        grad_logits.diagonal().sub_(weight)
        grad0 = grad1 = None
        # Through the normalisation: the part along the unit column drops out.
        with _full_precision(unit0):
            if ctx.needs_input_grad[0]:
                grad0 = torch.mm(unit1, grad_logits.T)
                grad0.sub_(unit0 * (grad0 * unit0).sum(dim=0)).mul_(inverse0)
            if ctx.needs_input_grad[1]:
                grad1 = torch.mm(unit0, grad_logits)
                grad1.sub_(unit1 * (grad1 * unit1).sum(dim=0)).mul_(inverse1)
        return grad0, grad1, None, None, None, None, None


class _BalanceGap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, assignments: Tensor, formula: Callable[[Tensor], Tensor]) -> Tensor:
        mass = assignments.sum(dim=0)
        total = threshold(mass.sum(), SMALLEST_MASS, torch.inf)
        share = mass / total
        ratio = (share * share.shape[0]).add_(SMALLEST_RATIO)
        log = ratio.log()
        ctx.save_for_backward(assignments, total, share, ratio, log)
        ctx.formula = formula
        return torch.dot(share, log).clamp_min_(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assignments, total, share, ratio, log = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiate(ctx, ctx.formula, grad, assignments), None
        slope = torch.addcdiv(log, share, ratio, value=share.shape[0])
        # Not in place: with batched gradients `grad` has a dimension more than `slope`.
        slope = slope.sub_(torch.dot(slope, share)) * (grad / total)
        return slope.expand_as(assignments), None
