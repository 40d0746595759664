"""SimCLR, MoCo v2, BYOL and C2BIN as plain modules with one `step`, over any parts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.utils import (
    batch_shuffle,
    batch_unshuffle,
    deactivate_requires_grad,
    update_momentum,
)
from lightly.utils.scheduler import cosine_schedule
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from c2bin_ext import C2BINObjective, MultiScaleClusterHead
from c2bin_ext.distributed import world_size
from c2bin_ext.functional import cluster_entropy_regularizer

__all__ = ["BYOLMethod", "Branches", "C2BINMethod", "Method", "MoCoV2Method", "SimCLRMethod"]


class Method(nn.Module, ABC):
    """A backbone, a projector on top of it, and one step; it knows no trainer."""

    criterion: Any  # the loss, which each method takes or makes
    follower_schedule: Literal["constant", "cosine"] = "constant"

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (n, feature_dim) of images (n, channels, height, width)."""
        features: Tensor = self.backbone(images).flatten(start_dim=1)
        return features

    @abstractmethod
    def step(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        """Return what to minimise under `"loss"` and what else to log beside it, all 0-dim."""

    def move_follower(self, progress: Callable[[], tuple[int, int]]) -> None:
        """Move the follower after a step; `progress` returns it and the steps of the run."""

    def span_processes(self, processes: int) -> None:
        """Make the loss, and the queue of MoCo v2, see the global batch of several processes."""
        for module in self.criterion.modules():
            if hasattr(module, "gather_distributed"):
                module.gather_distributed = True


class SimCLRMethod(Method):
    """SimCLR: NT-Xent between the projections of both views."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, temperature: float) -> None:
        super().__init__(backbone, projector)
        self.criterion = NTXentLoss(temperature=temperature)

    def step(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        """Return the NT-Xent loss of the two views under `"loss"`."""
        return {"loss": self.criterion(self.projector(self(view0)), self.projector(self(view1)))}


class Follower(NamedTuple):
    """γ of Eq. 8, and whether it stays or goes to 1 over the run."""

    momentum: float
    schedule: Literal["constant", "cosine"]


class _Bootstrap(Method):
    """A method with a follower, a frozen copy of backbone and projector that trails them, Eq. 8.

    The follower stays in training mode as in lightly: its normalisation layers use the batch and
    keep running statistics of their own; only parameters are averaged.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, follower: Follower) -> None:
        super().__init__(backbone, projector)
        momentum, schedule = follower
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"follower_momentum must lie in [0, 1], got {momentum}")
        if schedule not in ("constant", "cosine"):
            raise ValueError(f"follower_schedule must be 'constant' or 'cosine', got {schedule!r}")
        self.follower_momentum, self.follower_schedule = momentum, schedule
        self.follower_backbone = copy.deepcopy(backbone)
        self.follower_projector = copy.deepcopy(projector)
        # Without this, DDP would wait for gradients that never come.
        deactivate_requires_grad(self.follower_backbone)
        deactivate_requires_grad(self.follower_projector)

    @torch.no_grad()
    def follower_features(self, images: Tensor) -> Tensor:
        """Return the features of the follower's backbone, shape (n, feature_dim); no gradient."""
        features: Tensor = self.follower_backbone(images)
        return features.flatten(start_dim=1)

    def move_follower(self, progress: Callable[[], tuple[int, int]]) -> None:
        """Move the follower: `follower ← γ follower + (1 − γ) runner`."""
        momentum = self.follower_momentum
        if self.follower_schedule == "cosine":
            step, steps = progress()
            momentum = cosine_schedule(min(step, steps), steps, momentum, 1.0)
        update_momentum(self.backbone, self.follower_backbone, m=momentum)
        update_momentum(self.projector, self.follower_projector, m=momentum)


class MoCoV2Method(_Bootstrap):
    """MoCo v2: NT-Xent against a queue of the follower's projections."""

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        follower: Follower,
        criterion: NTXentLoss,
        symmetric: bool,
    ) -> None:
        super().__init__(backbone, projector, follower)
        self.symmetric = symmetric
        self.criterion = criterion
        # lightly leaves the queue out of the state dict; a resumed run would start from random
        # negatives.
        bank = self.criterion.memory_bank
        for name in ("bank", "bank_ptr"):
            bank.register_buffer(name, getattr(bank, name), persistent=True)

    def step(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        """Return the contrastive loss against the queue under `"loss"`."""
        loss = self._query(view0, view1)
        if self.symmetric:
            loss = (loss + self._query(view1, view0)) / 2
        return {"loss": loss}

    def _query(self, query: Tensor, key: Tensor) -> Tensor:
        # Shuffled over ranks, as the paper has it: batch norm must not tell which rank query and
        # key share.
        key, order = batch_shuffle(key, distributed=True) if world_size() > 1 else (key, None)
        with torch.no_grad():
            keys = self.follower_projector(self.follower_features(key))
        if order is not None:
            keys = batch_unshuffle(keys, order, distributed=True)
        loss: Tensor = self.criterion(self.projector(self(query)), keys)
        return loss


class Branches(NamedTuple):
    """What a method with a predictor makes of two views; each field is a pair, one per view."""

    features: tuple[Tensor, ...]  # of the runner's backbone, (n, feature_dim)
    predictions: tuple[Tensor, ...]  # (n, projection_dim)
    targets: tuple[Tensor, ...]  # the follower's projections, (n, projection_dim); no gradient
    followed: tuple[Tensor, ...]  # of the follower's backbone, (n, feature_dim); no gradient


class BYOLMethod(_Bootstrap):
    """BYOL: a predictor of the follower's projection of the other view."""

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, follower: Follower, predictor: nn.Module
    ) -> None:
        super().__init__(backbone, projector, follower)
        self.predictor = predictor
        self.criterion = NegativeCosineSimilarity()

    def step(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        """Return the total under `"loss"`, and its parts if there are any."""
        return self.objective(self.branches(view0, view1))

    def branches(self, view0: Tensor, view1: Tensor) -> Branches:
        """Return what runner and follower make of both views."""
        features = self(view0), self(view1)
        followed = self.follower_features(view0), self.follower_features(view1)
        return Branches(
            features=features,
            predictions=tuple(self.predictor(self.projector(f)) for f in features),
            targets=tuple(map(self.follower_projector, followed)),
            followed=followed,
        )

    def objective(self, branches: Branches) -> dict[str, Tensor]:
        """Return 1 − cosine, averaged over both directions, under `"loss"`."""
        (p0, p1), (z0, z1) = branches.predictions, branches.targets
        return {"loss": 1 + (self.criterion(p0, z1) + self.criterion(p1, z0)) / 2}


class C2BINMethod(BYOLMethod):
    """C2BIN: BYOL with a `C2BINObjective`, which holds the cluster heads, for its loss."""

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        follower: Follower,
        predictor: nn.Module,
        objective: C2BINObjective,
        against: Literal["runner", "follower"],
    ) -> None:
        super().__init__(backbone, projector, follower, predictor)
        if against not in ("runner", "follower"):
            raise ValueError(f"against must be 'runner' or 'follower', got {against!r}")
        self.against = against
        self.criterion = objective

    @property
    def cluster_head(self) -> MultiScaleClusterHead:
        """The cluster heads, which train with the runner."""
        head: MultiScaleClusterHead = self.criterion.head
        return head

    def assignments(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return each head's soft assignments (n, K) of images (n, channels, height, width)."""
        assignments: tuple[Tensor, ...] = self.cluster_head(self(images))
        return assignments

    def span_processes(self, processes: int) -> None:
        """Say so when a loss that was given does not see the whole global batch."""
        if not getattr(self.criterion.loss, "gather_distributed", True):
            rank_zero_warn(
                f"loss: gather_distributed is False, so each of the {processes} processes "
                "contrasts the clusters of its own images only; "
                "C2BINLoss(gather_distributed=True) contrasts those of the global batch."
            )

    def objective(self, branches: Branches) -> dict[str, Tensor]:
        """Return the total and its parts, and each head's effective number of clusters."""
        # The objective's own call, with the heads' assignments at hand for what is logged.
        heads = [self.cluster_head(features) for features in branches.features]
        fixed = None
        if self.against == "follower":
            with torch.no_grad():
                fixed = [self.cluster_head(features) for features in branches.followed]
        losses: dict[str, Tensor] = self.criterion.loss(
            branches.predictions, branches.targets, heads, target_assignments=fixed
        )._asdict()
        with torch.no_grad():
            for i, assignments in enumerate(heads[0]):
                k = assignments.shape[1]
                # The regularizer is log K − H of the mean assignment, so exp(H) is K times exp of
                # its negative.
                losses[f"effective_clusters_{i}_of_{k}"] = (
                    k * (-cluster_entropy_regularizer(assignments)).exp()
                )
        return losses
