"""What keeps values and gradients finite, and when closed-form gradients serve.

Closed forms are for eager training steps. What else differentiates, compilation, `torch.func`,
forward mode and second derivatives, goes through the formulas, which autograd follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Squared norms up to this count as zero: the cube of the inverse norm, which the derivative takes,
# must stay inside float32.
SMALLEST_SQUARE = 1e-24
# Far below the share of any cluster that float32 assignments can give mass to; its logarithm is
# what bounds the gradient of an empty cluster.
SMALLEST_RATIO = 1e-36
SMALLEST_MASS = 1e-12

# autocast knows no meta device, and none of Apple's before torch 2.5.
_WITHOUT_AUTOCAST = {"meta"} | ({"mps"} if torch.__version__ < "2.5" else set())

# torch._C._functorch.is_legacy_batchedtensor is younger than torch 2.2.
_BATCHED: Any = torch._C._parse_dispatch_key("Batched")

# The public name is younger than torch 2.2, the oldest release served.
is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which matrix products keep the dtype of their operands."""
    kind = tensor.device.type
    return nullcontext() if kind in _WITHOUT_AUTOCAST else torch.autocast(kind, enabled=False)


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in their common dtype, or in float32 where that is a narrower one."""
    if all(tensor.dtype is torch.float32 for tensor in tensors):
        return tensors
    dtype = wide_dtype(*tensors)
    return tuple(tensor.to(dtype) for tensor in tensors)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that `at_least_float32` gives the tensors."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def smallest_square(dtype: torch.dtype) -> float:
    """Return the largest squared norm that counts as zero in vectors of this dtype.

    Float16 holds gradients of 1 / norm up to 65504 alone. A vector shorter than its smallest
    normal number, which has few bits of direction left anyway, would send an infinity back.
    """
    if dtype is torch.float32:
        return SMALLEST_SQUARE
    return max(SMALLEST_SQUARE, torch.finfo(dtype).tiny ** 2)


def inverse_norm(squares: Tensor, floor: float = SMALLEST_SQUARE) -> Tensor:
    """Return 1/sqrt of squared norms, and 0, with gradient 0, where they are at most `floor`."""
    return torch.threshold(squares, floor, math.inf).rsqrt()


def unit_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows at length 1, and 0, with gradient 0, where all entries are tiny in `dtype`.

    `dtype` is that of the rows before they were widened.
    """
    # Dividing by the largest entry first keeps squares inside the range of the dtype.
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    rows = rows * torch.threshold(largest, torch.finfo(dtype).tiny, math.inf).reciprocal()
    return rows * inverse_norm((rows * rows).sum(dim=1, keepdim=True))


def is_eager(*tensors: Tensor) -> bool:
    """Tell whether this is an eager, reverse-mode step, which closed-form gradients serve."""
    return not (
        is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (forward_ad._current_level >= 0 and any(_tangent(t) is not None for t in tensors))
    )


def is_readable(tensor: Tensor) -> bool:
    """Tell whether reading values waits for nothing, and there are some: not in fake tensors."""
    plain = tensor.is_cpu and type(tensor) is Tensor
    return plain and not torch._C._len_torch_dispatch_stack()


def _tangent(tensor: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent


def wants_formula(*grads: Tensor | None) -> bool:
    """Tell whether a backward pass wants a graph, or gets gradients that nothing may write into.

    The first is that of `create_graph=True`, the second that of `is_grads_batched=True`.
    """
    return torch.is_grad_enabled() or any(
        grad is not None and torch._C._dispatch_keys(grad).has(_BATCHED) for grad in grads
    )


def differentiate(
    formula: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return autograd's gradients of the formula, itself with a gradient."""
    with torch.enable_grad():
        # Aliases: one input can be computed from another, or be the same tensor, and the derivative
        # by each must not pass through the other.
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        wanted = [alias for alias, need in zip(aliases, needed, strict=True) if need]
        pairs = [
            (output, grad)
            for output, grad in zip(formula(*aliases), grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        outputs, incoming = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(outputs, wanted, incoming, create_graph=True, allow_unused=True)
        )
    return [next(found) if need else None for need in needed]
