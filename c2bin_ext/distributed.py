"""Sums of batch statistics over ranks, with the gradient that DDP's averaging makes exact.

Every batch statistic of C2BIN is a sum over instances, so the loss of the global batch needs one
all-reduce of these sums, and no features are gathered. All ranks then compute the same loss from
the same sums, so the derivative of the sum of W equal losses reaches each rank's statistics with
the factor W, and that is what cancels the 1/W of DDP's (or FSDP's) gradient averaging:

    (1/W) Σ_r  W · ∂L/∂S · ∂S_r/∂θ  =  ∂L/∂θ  on the concatenated batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["sum_over_ranks", "world_size"]


def world_size() -> int:
    """Return the number of processes of the default group, 1 where none is initialised.

    Returns:
        The world size W, >= 1.

    Examples:
        >>> from c2bin_ext.distributed import world_size
        >>> world_size()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        # Nothing to keep; with it, torch.func can differentiate too.
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Each rank holds the same loss of the same sums, hence the same `grad`: adding up the W
        # equal gradients needs no second collective.
        return grad * dist.get_world_size()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks of the default process group, in one all-reduce.

    Formula: `S = Σ_r S_r`. The gradient is W times the gradient of `S`, which is exact after an
    averaging of gradients over ranks (DDP, FSDP) when every rank computes the same loss from `S`.
    Must be called by every rank, with the same shape. Without a process group, or with one
    process, the tensor comes back as it is.

    Args:
        tensor: local sums over instances, any shape.

    Returns:
        The global sums, of the same shape and dtype.

    Examples:
        >>> import torch
        >>> from c2bin_ext.distributed import sum_over_ranks
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor if world_size() == 1 else _SumOverRanks.apply(tensor)
