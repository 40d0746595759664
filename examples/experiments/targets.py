"""Other targets for C2BIN's clusters than the follower's of the same image, as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from c2bin_ext import C2BINLoss, MultiScaleClusterHead
from c2bin_ext.functional import Heads


class TemperedHead(MultiScaleClusterHead):
    """Cluster heads whose softmax has a temperature, `softmax((W r + b) / T)`, as C2BIN's do not.

    Args:
        head: Whose sizes and options to take.
        temperature: T.
    """

    def __init__(self, head: MultiScaleClusterHead, temperature: float) -> None:
        super().__init__(head.in_features, head.num_clusters, normalize=head.normalize)
        self.temperature = temperature

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return each head's soft assignments (n, K) of features (n, d)."""
        return tuple((z / self.temperature).softmax(dim=1) for z in self.logits(features))


class Sharpened(nn.Module):
    """`C2BINLoss` whose targets are sharper than the assignments that are held against them.

    Formula: `softmax(z / T)` in place of `softmax(z)` for the follower's clusters, as DINO has it.

    Args:
        loss: The loss.
        temperature: T, below 1.
    """

    def __init__(self, loss: C2BINLoss, temperature: float) -> None:
        super().__init__()
        self.loss, self.temperature = loss, temperature

    def forward(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        heads: Heads,
        target_assignments: Heads,
    ) -> Any:
        """Return the loss and its parts, as `C2BINLoss` does."""
        sharp = [
            [(p.clamp(min=1e-12).log() / self.temperature).softmax(dim=1) for p in view]
            for view in target_assignments
        ]
        return self.loss(predictions, targets, heads, target_assignments=sharp)


class LastRows(nn.Module):
    """A queue: the last rows, without gradient.

    Args:
        size: Rows that are kept.
        width: Length of a row.
    """

    rows: Tensor
    seen: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def keep(self, batch: Tensor) -> None:
        """Keep the rows of a batch in place of the oldest."""
        size = len(self.rows)
        kept = batch[-size:].to(self.rows.dtype)
        places = torch.arange(len(kept), device=batch.device) + self.seen
        self.rows[places % size] = kept
        self.seen += len(kept)


class NearestFeatures(LastRows):
    """A queue of features of other images, which gives the nearest of them."""

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Return for each row (n, d) the row of the queue whose cosine is largest."""
        cosines = normalize(features.float()) @ normalize(self.rows).t()
        empty = torch.arange(len(self.rows), device=features.device) >= self.seen
        return self.rows[cosines.masked_fill(empty, -2).argmax(dim=1)].to(features.dtype)
