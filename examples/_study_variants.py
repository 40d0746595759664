"""C2BIN with what the paper does not say: to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from c2bin_lightly import C2BIN
from torch import Tensor, nn

from c2bin_ext import C2BINLoss, MultiScaleClusterHead
from c2bin_ext.functional import bca_contrastive_loss, cluster_entropy_regularizer

Views = tuple[Sequence[Tensor], Sequence[Tensor]]


class StandardizedHead(MultiScaleClusterHead):
    """Cluster heads on features that are standardised over the batch."""

    def __init__(self, in_features: int, num_clusters: Sequence[int]) -> None:
        super().__init__(in_features, num_clusters)
        self.norm = nn.BatchNorm1d(in_features, affine=False)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return each head's soft assignments (n, K) of features (n, d)."""
        assignments: tuple[Tensor, ...] = super().forward(self.norm(features))
        return assignments


class AssignmentQueue(nn.Module):
    """The last assignments of both views and all heads, without gradient.

    Args:
        size: Rows that are kept.
        num_clusters: K of each head.
    """

    rows: Tensor
    seen: Tensor

    def __init__(self, size: int, num_clusters: Sequence[int]) -> None:
        super().__init__()
        self.size, self.num_clusters = size, list(num_clusters)
        # A row per image: all heads side by side, view 0 and then view 1.
        self.register_buffer("rows", torch.zeros(size, 2 * sum(num_clusters)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, heads: Views) -> Views:
        """Return assignments with the rows kept below them; keep these in place of the oldest."""
        batch = torch.cat([*heads[0], *heads[1]], dim=1)
        past = self.rows[: min(self.size, int(self.seen))]
        both = torch.cat([batch, past.clone()])
        kept = batch.detach()[-self.size :].to(self.rows.dtype)
        places = (int(self.seen) + torch.arange(len(kept), device=batch.device)) % self.size
        self.rows[places] = kept
        self.seen += len(kept)
        parts = both.split([*self.num_clusters, *self.num_clusters], dim=1)
        heads_of = len(self.num_clusters)
        return parts[:heads_of], parts[heads_of:]


class RunningStatistics(nn.Module):
    """Exponentially decayed mean of batch sums; the past is constant, the batch has the gradient.

    Formula: `A_t = (S_t + β S_{t-1} + β² S_{t-2} + …) / (1 + β + β² + …)`.

    Args:
        decay: β, 0 <= β < 1.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}")
        self.decay = decay
        self.sums: Tensor | float = 0.0
        self.weight = 0.0

    def forward(self, batch: Tensor) -> Tensor:
        """Return smoothed sums and take in those of a batch; the mean is exact from the first."""
        self.sums = self.decay * self.sums + batch
        self.weight = self.decay * self.weight + 1
        return self.sums / self.weight


class Smoothed(nn.Module):
    """`C2BINLoss` whose cluster terms are those of statistics carried over steps."""

    def __init__(self, loss: C2BINLoss, decay: float) -> None:
        super().__init__()
        self.loss, self.running = loss, RunningStatistics(decay)

    def forward(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        heads: Views,
        target_assignments: None = None,
        statistics: None = None,
    ) -> Any:
        """Return the loss and its parts, as `C2BINLoss` does."""
        loss = self.loss
        own = loss.statistics(predictions, targets, heads)
        # Cosines and count are of this step alone.
        step = len(predictions) + 1 if loss.symmetric_alignment else 2
        total = torch.cat([own[:step], self.running(own[step:])])
        found = loss(predictions, targets, heads, statistics=total)
        clusters = found.contrast + loss.entropy_weight * found.entropy
        # The batch's own share of the gradient. Giving it the whole, at lagging statistics, makes
        # the heads overshoot: clusters die.
        clusters = clusters.detach() + (clusters - clusters.detach()) / self.running.weight
        return found._replace(loss=found.alignment + loss.cluster_weight * clusters)


class VariedC2BIN(C2BIN):
    """C2BIN with other wirings of its cluster branch.

    Args:
        backbone: As in `C2BIN`.
        feature_dim: As in `C2BIN`.
        standardize: Standardise features over the batch for the heads, in place of `normalize`.
        warmup: Part of the run in which the cluster weight rises from 0.
        queue: Past images whose assignments stand beside the batch's in the cluster terms.
        decay: Of `RunningStatistics` of the cluster terms; 0 for none.
        **c2bin: See `C2BIN`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        standardize: bool = False,
        warmup: float = 0.0,
        queue: int = 0,
        decay: float = 0.0,
        **c2bin: Any,
    ) -> None:
        super().__init__(backbone, feature_dim, **c2bin)
        if (queue or decay) and self.against == "follower":
            raise ValueError("queue, decay: expected 0 against the follower, got another number")
        objective = self.criterion
        if standardize:
            objective.head = StandardizedHead(feature_dim, objective.head.num_clusters)
        self.warmup = warmup
        self.cluster_weight = objective.loss.cluster_weight
        if queue:
            past = AssignmentQueue(queue, objective.head.num_clusters)
            objective.loss = Queued(objective.loss, past)
        elif decay:
            objective.loss = Smoothed(objective.loss, decay)

    def on_train_batch_start(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Set the cluster weight of this step."""
        super().on_train_batch_start(batch, batch_idx)
        if self.warmup:
            steps = self.warmup * int(self.trainer.estimated_stepping_batches)
            part = min(1.0, self.global_step / max(1.0, steps))
            self.criterion.loss.cluster_weight = self.cluster_weight * part


class Queued(nn.Module):
    """`C2BINLoss` with a queue under the cluster terms; the alignment is the batch's."""

    def __init__(self, loss: C2BINLoss, queue: AssignmentQueue) -> None:
        super().__init__()
        self.loss, self.queue = loss, queue

    def forward(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        heads: Views,
        target_assignments: None = None,
        statistics: None = None,
    ) -> Any:
        """Return the loss and its parts, as `C2BINLoss` does."""
        loss = self.loss
        own = loss(predictions, targets, heads)
        views = self.queue(heads)
        contrast = sum(
            bca_contrastive_loss(
                *pair,
                temperature=loss.temperature,
                similarity=loss.similarity,
                positive_in_denominator=loss.positive_in_denominator,
                symmetric=loss.symmetric,
            )
            for pair in zip(*views, strict=True)
        )
        gaps = [cluster_entropy_regularizer(head) for view in views for head in view]
        entropy = torch.stack(gaps).sum() / 2
        total = own.alignment + loss.cluster_weight * (contrast + loss.entropy_weight * entropy)
        return own._replace(loss=total, contrast=contrast, entropy=entropy)


VARIATIONS = ("standardize", "warmup", "queue", "decay")
