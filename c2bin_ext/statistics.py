"""Sums over instances beyond the batch at hand: carried over steps, or taken over micro-batches.

All that C2BIN's cluster terms need of a batch are sums over instances: Gram matrices of BCAs, their
squared norms, cluster masses. So the loss of more instances than fit into memory needs no features
of the others, only their sums: O(K²) numbers a head, whatever the number of instances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from c2bin_ext import _checks
from c2bin_ext._numerics import is_compiling

__all__ = ["RunningStatistics", "at_value_of"]


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


class RunningStatistics(nn.Module):
    """Exponentially decayed mean of batch sums; the past is constant, the batch has the gradient.

    Formula: `A_t = (S_t + β S_{t-1} + β² S_{t-2} + …) / (1 + β + β² + …)`.

    Smoothed over some 1/(1 - β) steps, so a batch has a share of about 1 - β in it, and the
    gradient of the loss that share. The mean, and with it cosines and shares of mass, is exact from
    the first step on. It moves in training mode alone. A batch with a non-finite sum, as when half
    precision overflows, is used but not remembered.

    Sums are kept in float32 at least, in a buffer that state dicts carry. Every rank keeps the same
    sums when those it is given are global, as with `gather_distributed=True`.

    Args:
        size: how many sums there are.
        decay: β, 0 <= β < 1.

    Returns:
        Called with sums (size,): smoothed sums (size,).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a decay outside [0, 1); at the call, a shape that does not fit.

    Examples:
        >>> import torch
        >>> from c2bin_ext.statistics import RunningStatistics
        >>> running = RunningStatistics(size=1, decay=0.5)
        >>> [round(float(running(torch.tensor([s]))), 3) for s in (3.0, 3.0, 10.0)]
        [3.0, 3.0, 7.0]

    Source: this library; the paper reports that its loss is unstable once K exceeds the batch
    (Table 2), where a batch says little about most columns.
    """

    sums: Tensor
    weight: Tensor

    def __init__(self, size: int, decay: float) -> None:
        super().__init__()
        self.decay = decay_rate("decay", decay)
        _checks.whole_number("size", size, 1)
        self.register_buffer("sums", torch.zeros(size))
        self.register_buffer("weight", torch.zeros(()))

    def extra_repr(self) -> str:
        return f"size={self.sums.numel()}, decay={self.decay}"

    def forward(self, own: Tensor) -> Tensor:
        if own.shape != self.sums.shape:
            raise ValueError(
                f"own: expected {self.sums.numel()} sums, got shape {tuple(own.shape)}; running "
                "statistics were made for other numbers of clusters"
            )
        batch = own.detach()
        sums, weight = self.decay * self.sums + own, self.decay * self.weight + 1
        if self.training:
            # A number that is not finite would never decay away; torch.where does not wait for
            # the GPU to tell.
            finite = batch.isfinite().all()
            with torch.no_grad():
                new = [
                    torch.where(finite, now, before)
                    for now, before in ((sums, self.sums), (weight, self.weight))
                ]
                if is_compiling():
                    # Compiled, the backward pass computes `weight` again, from the buffer as it
                    # is then: it must still find what this step began with.
                    self.sums, self.weight = new
                else:
                    self.sums.copy_(new[0])
                    self.weight.copy_(new[1])
        # The batch's own share of the gradient. Giving it the whole, at lagging statistics, makes
        # the heads overshoot: clusters die.
        return (sums / weight).to(own.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningStatistics:
        sums, weight = self.sums, self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Half precision, of model.half() say, holds neither sums of thousands nor their decay.
        if self.sums.dtype in (torch.float16, torch.bfloat16):
            self.sums = sums.to(self.sums.device)
            self.weight = weight.to(self.weight.device)
        return self


def decay_rate(name: str, value: float) -> float:
    """Return a decay, which must lie in [0, 1)."""
    value = _checks.finite_number(name, value)
    if value >= 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
    return value


def running_statistics(
    decay: float, num_clusters: Sequence[int] | None, size: Callable[[int], int]
) -> RunningStatistics | None:
    """Return what a loss carries over steps: nothing without a decay.

    `size` tells how many sums a head of K clusters has.
    """
    decay = decay_rate("running_decay", decay)
    if num_clusters is None:
        if decay > 0:
            raise ValueError(
                "num_clusters: expected the number of clusters, since running_decay "
                f"{decay} keeps statistics of them over steps, got None"
            )
        return None
    total = sum(size(k) for k in _checks.cluster_counts(num_clusters))
    return RunningStatistics(total, decay) if decay > 0 else None
