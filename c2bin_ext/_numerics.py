"""What keeps values and gradients finite: float32 arithmetic, and floors where 0 would divide."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import threshold

# Squared norms up to this count as zero: the cube of the inverse norm, which the derivative takes,
# must stay inside float32.
SMALLEST_SQUARE = 1e-24
# Far below the share of any cluster that float32 assignments can give mass to; its logarithm is
# what bounds the gradient of an empty cluster.
SMALLEST_RATIO = 1e-36
SMALLEST_MASS = 1e-12


def inverse_norm(squares: Tensor) -> Tensor:
    """Return 1/sqrt of squared norms, and 0, with gradient 0, where the norm vanishes."""
    return threshold(squares, SMALLEST_SQUARE, math.inf).rsqrt()


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which matrix products keep the dtype of their operands."""
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


class _UpcastHalf(torch.autograd.Function):
    # Of a column with a norm of 1e-7, the cosine has a gradient of 1e7: more than float16 holds.
    # Saturating keeps the direction where a plain cast would hand an infinity to the optimizer.
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # A sixteenth of the range, so that the gradients of several losses still add up inside it.
        limit = torch.finfo(ctx.dtype).max / 16
        return grad.clamp(-limit, limit).to(ctx.dtype)


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in their common dtype, or in float32 where that is a narrower one."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(
        (_UpcastHalf.apply(tensor) if tensor.itemsize < 4 else tensor).to(dtype)
        for tensor in tensors
    )
