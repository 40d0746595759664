"""SimCLR, MoCo v2, BYOL and C2BIN as LightningModules, built from lightly's parts."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import (
    batch_shuffle,
    batch_unshuffle,
    deactivate_requires_grad,
    get_weight_decay_parameters,
    update_momentum,
)
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from pytorch_lightning.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import Unpack

from c2bin_ext import C2BINLoss, C2BINObjective, MultiScaleClusterHead
from c2bin_ext.functional import cluster_entropy_regularizer
from c2bin_ext.monitoring import ClusterMonitor, warn_if_more_clusters_than_images
from c2bin_lightly._epochs import SeededEpochs


class Optimization(TypedDict, total=False):
    """Keyword arguments that every method takes: how its runner is optimised.

    Biases and the parameters of normalisation layers get no weight decay (and, under LARS, no
    layer-wise scaling).

    Keys:
        optimizer: `"sgd"` (default), `"lars"` or `"adam"`.
        lr: Learning rate of the whole global batch, used as given: it is not scaled by the batch.
            Default 0.06.
        weight_decay: Default 5e-4.
        momentum: Of SGD and LARS; Adam keeps its own betas. Default 0.9.
        schedule: `"cosine"` (default), down to a thousandth of `lr` at the last step, or
            `"constant"`.
        warmup_epochs: Linear warm-up from 0, in epochs. Default 0.
    """

    optimizer: Literal["sgd", "lars", "adam"]
    lr: float
    weight_decay: float
    momentum: float
    schedule: Literal["cosine", "constant"]
    warmup_epochs: float


_DEFAULTS = Optimization(
    optimizer="sgd", lr=0.06, weight_decay=5e-4, momentum=0.9, schedule="cosine", warmup_epochs=0
)


def trained_by_decay(modules: Iterable[nn.Module]) -> tuple[list[nn.Parameter], ...]:
    """Return the trainable parameters with weight decay, and those without."""
    return tuple(
        [parameter for parameter in group if parameter.requires_grad]
        for group in get_weight_decay_parameters(modules)
    )


class _Method(SeededEpochs, ABC):
    """What the four methods share: the backbone, the batch contract, logging and optimisation."""

    criterion: Any  # the loss, which each method makes

    def __init__(
        self, backbone: nn.Module, feature_dim: int, **optimization: Unpack[Optimization]
    ) -> None:
        super().__init__()
        unknown = sorted(set(optimization) - set(_DEFAULTS))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} got unknown arguments {unknown}; known: {sorted(_DEFAULTS)}"
            )
        options: dict[str, Any] = {**_DEFAULTS, **optimization}
        for key, known in (
            ("optimizer", ("sgd", "lars", "adam")),
            ("schedule", ("cosine", "constant")),
        ):
            if options[key] not in known:
                raise ValueError(f"{key} must be one of {known}, got {options[key]!r}")
        # A module in the hyperparameters would store the weights twice, and any object but plain
        # ones stops weights_only loading.
        self.save_hyperparameters(ignore=["backbone", "projector", "loss", "dataloader_kNN"])
        self.backbone = backbone
        self.optimization = options

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (n, feature_dim) of images (n, channels, height, width)."""
        features: Tensor = self.backbone(images).flatten(start_dim=1)
        return features

    def setup(self, stage: str) -> None:
        """Make the loss see the whole global batch when there is more than one process."""
        if self.trainer.world_size > 1:
            # Of MoCo v2 also its queue.
            for module in self.criterion.modules():
                if hasattr(module, "gather_distributed"):
                    module.gather_distributed = True

    @abstractmethod
    def losses(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        """Return what to minimise under `"loss"` and what else to log beside it, all 0-dim."""

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Take `((view0, view1), ...)`, views (n, channels, height, width); labels are not read."""
        view0, view1 = batch[0]
        losses = self.losses(view0, view1)
        self.log_losses(losses, len(view0))
        return losses["loss"]

    def log_losses(self, losses: dict[str, Tensor], batch_size: int) -> None:
        """Log the means over an epoch, under `train_`; nothing is read before its end."""
        self.log_dict(
            {f"train_{name}": value.detach() for name, value in losses.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=batch_size,
        )

    def learning_rate(self) -> float:
        """Return the learning rate of the whole global batch."""
        rate: float = self.optimization["lr"]
        return rate

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters, those without weight decay in a group of their own."""
        decayed, undecayed = trained_by_decay([self])
        return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]

    def configure_optimizers(self) -> Any:
        """Return the optimiser of the trainable parameters and its step-wise schedule."""
        options = self.optimization
        groups = self.parameter_groups()
        common = {"lr": self.learning_rate(), "weight_decay": options["weight_decay"]}
        optimizer: torch.optim.Optimizer
        if options["optimizer"] == "adam":
            optimizer = torch.optim.Adam(groups, **common)
        else:
            kind = LARS if options["optimizer"] == "lars" else torch.optim.SGD
            optimizer = kind(groups, momentum=options["momentum"], **common)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = CosineWarmupScheduler(
            optimizer,
            warmup_epochs=min(
                steps, round(options["warmup_epochs"] * steps / (self.trainer.max_epochs or 1))
            ),
            max_epochs=steps,
            end_value=0.001 if options["schedule"] == "cosine" else 1.0,
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class SimCLR(_Method):
    """SimCLR: instances of the batch are each other's negatives (Chen et al., 2020).

    Args:
        backbone: Any module that maps images (n, channels, height, width) to features that flatten
            to (n, feature_dim).
        feature_dim: Length of one feature vector.
        hidden_dim: Width of the projector's hidden layer.
        projection_dim: Length of a projection.
        temperature: Divides the cosine similarities.
        **optimization: See `Optimization`.

    Examples:
        >>> from torch import nn
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
        >>> model = SimCLR(backbone, feature_dim=8, hidden_dim=16)
        >>> model(torch.rand(5, 3, 2, 2)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        hidden_dim: int = 512,
        projection_dim: int = 128,
        temperature: float = 0.5,
        **optimization: Unpack[Optimization],
    ) -> None:
        super().__init__(backbone, feature_dim, **optimization)
        self.projector = SimCLRProjectionHead(feature_dim, hidden_dim, projection_dim)
        self.criterion = NTXentLoss(temperature=temperature)

    def losses(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        """Return the NT-Xent loss of the two views under `"loss"`."""
        return {"loss": self.criterion(self.projector(self(view0)), self.projector(self(view1)))}


class _Bootstrap(_Method):
    """A method with a follower: a frozen copy of backbone and projector that trails the runner, Eq.
    8.

    The follower stays in training mode as in lightly: its normalisation layers use the batch and
    keep running statistics of their own; only parameters are averaged.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        projector: nn.Module,
        follower_momentum: float,
        follower_schedule: Literal["constant", "cosine"],
        **optimization: Unpack[Optimization],
    ) -> None:
        super().__init__(backbone, feature_dim, **optimization)
        if not 0.0 <= follower_momentum <= 1.0:
            raise ValueError(f"follower_momentum must lie in [0, 1], got {follower_momentum}")
        if follower_schedule not in ("constant", "cosine"):
            raise ValueError(
                f"follower_schedule must be 'constant' or 'cosine', got {follower_schedule!r}"
            )
        self.projector = projector
        self.follower_momentum = follower_momentum
        self.follower_schedule = follower_schedule
        self.follower_backbone = copy.deepcopy(backbone)
        self.follower_projector = copy.deepcopy(projector)
        # Without this, DDP would wait for gradients that never come.
        deactivate_requires_grad(self.follower_backbone)
        deactivate_requires_grad(self.follower_projector)

    @torch.no_grad()
    def follow(self, images: Tensor) -> Tensor:
        """Return the follower's projections, shape (n, projection_dim); no gradient."""
        projections: Tensor = self.follower_projector(self.follower_features(images))
        return projections

    @torch.no_grad()
    def follower_features(self, images: Tensor) -> Tensor:
        """Return the features of the follower's backbone, shape (n, feature_dim); no gradient."""
        features: Tensor = self.follower_backbone(images)
        return features.flatten(start_dim=1)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the runner, then move the follower: `follower ← γ follower + (1 − γ) runner`."""
        # Here and not in training_step: under gradient accumulation the follower moves once per
        # optimiser step.
        super().optimizer_step(*args, **kwargs)
        momentum = self.follower_momentum
        if self.follower_schedule == "cosine":
            steps = int(self.trainer.estimated_stepping_batches)
            momentum = cosine_schedule(min(self.trainer.global_step, steps), steps, momentum, 1.0)
        update_momentum(self.backbone, self.follower_backbone, m=momentum)
        update_momentum(self.projector, self.follower_projector, m=momentum)


class MoCoV2(_Bootstrap):
    """MoCo v2: negatives come from a queue of the follower's projections (Chen et al., 2020).

    Args:
        backbone: Any module that maps images (n, channels, height, width) to features that flatten
            to (n, feature_dim).
        feature_dim: Length of one feature vector.
        hidden_dim: Width of the projector's hidden layer.
        projection_dim: Length of a projection.
        temperature: Divides the cosine similarities.
        queue_size: Projections kept as negatives. Much more than the data set holds makes every
            image its own negative.
        symmetric: Let each view be the query once, as lightly's CIFAR-10 benchmark does; False is
            the paper's form.
        follower_momentum: γ of Eq. 8.
        follower_schedule: `"constant"`, or `"cosine"` from γ to 1 over the run.
        **optimization: See `Optimization`.

    Examples:
        >>> from torch import nn
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
        >>> model = MoCoV2(backbone, feature_dim=8, queue_size=64)
        >>> model(torch.rand(5, 3, 2, 2)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        hidden_dim: int = 512,
        projection_dim: int = 128,
        temperature: float = 0.2,
        queue_size: int = 4096,
        symmetric: bool = True,
        follower_momentum: float = 0.99,
        follower_schedule: Literal["constant", "cosine"] = "constant",
        **optimization: Unpack[Optimization],
    ) -> None:
        projector = MoCoProjectionHead(feature_dim, hidden_dim, projection_dim)
        super().__init__(
            backbone, feature_dim, projector, follower_momentum, follower_schedule, **optimization
        )
        self.symmetric = symmetric
        self.criterion = NTXentLoss(
            temperature=temperature, memory_bank_size=(queue_size, projection_dim)
        )
        # lightly leaves the queue out of the state dict; a resumed run would start from random
        # negatives.
        bank = self.criterion.memory_bank
        for name in ("bank", "bank_ptr"):
            bank.register_buffer(name, getattr(bank, name), persistent=True)

    def losses(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        """Return the contrastive loss against the queue under `"loss"`."""
        loss = self._query(view0, view1)
        if self.symmetric:
            loss = (loss + self._query(view1, view0)) / 2
        return {"loss": loss}

    def _query(self, query: Tensor, key: Tensor) -> Tensor:
        # Shuffled over ranks, as the paper has it: batch norm must not tell which rank query and
        # key share.
        if self._trainer is not None and self.trainer.world_size > 1:
            key, order = batch_shuffle(key, distributed=True)
            keys = batch_unshuffle(self.follow(key), order, distributed=True)
        else:
            keys = self.follow(key)
        loss: Tensor = self.criterion(self.projector(self(query)), keys)
        return loss


class Branches(NamedTuple):
    """What a method with a predictor makes of two views; each field is a pair, one per view.

    Attributes:
        features: Of the runner's backbone, (n, feature_dim).
        predictions: Of the runner's predictor, (n, projection_dim).
        targets: The follower's projections, (n, projection_dim); no gradient.
        followed: The features of the follower's backbone, (n, feature_dim); no gradient.
    """

    features: tuple[Tensor, ...]
    predictions: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    followed: tuple[Tensor, ...]


class BYOL(_Bootstrap):
    """BYOL: predict the follower's projection of the other view; no negatives (Grill et al., 2020).

    Args:
        backbone: Any module that maps images (n, channels, height, width) to features that flatten
            to (n, feature_dim).
        feature_dim: Length of one feature vector.
        hidden_dim: Width of the hidden layer of projector and predictor.
        projection_dim: Length of a projection.
        follower_momentum: γ of Eq. 8.
        follower_schedule: `"constant"`, or `"cosine"` from γ to 1 over the run.
        **optimization: See `Optimization`.

    Examples:
        >>> from torch import nn
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
        >>> model = BYOL(backbone, feature_dim=8, hidden_dim=16)
        >>> view0, view1 = torch.rand(2, 5, 3, 2, 2)
        >>> sorted(model.losses(view0, view1))
        ['loss']
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        hidden_dim: int = 512,
        projection_dim: int = 512,
        follower_momentum: float = 0.99,
        follower_schedule: Literal["constant", "cosine"] = "constant",
        **optimization: Unpack[Optimization],
    ) -> None:
        projector = BYOLProjectionHead(feature_dim, hidden_dim, projection_dim)
        super().__init__(
            backbone, feature_dim, projector, follower_momentum, follower_schedule, **optimization
        )
        self.predictor = BYOLPredictionHead(projection_dim, hidden_dim, projection_dim)
        self.criterion = NegativeCosineSimilarity()

    def losses(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        """Return 1 − cosine, averaged over both directions, under `"loss"`."""
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
        """Return the losses of one batch."""
        predictions, targets = branches.predictions, branches.targets
        cosines = [
            self.criterion(predictions[0], targets[1]),
            self.criterion(predictions[1], targets[0]),
        ]
        return {"loss": 1 + (cosines[0] + cosines[1]) / 2}


class C2BIN(BYOL):
    """C2BIN: BYOL, plus cluster heads on the runner's backbone features whose clusters are
    contrasted.

    Beside `train_loss` it logs `train_alignment`, `train_contrast`, `train_entropy` and, for each
    head i of K clusters, `train_effective_clusters_i_of_K`: exp of the entropy of the mean
    assignment, between 1 (collapsed) and K.

    Given validation images and labels, `(images, labels, ...)`, it also logs for each head, over
    all ranks, the scores of `c2bin_ext.monitoring.ClusterMonitor`: `val_nmi_i_of_K`, `val_acc_…`,
    `val_purity_…`, `val_ari_…`, `val_clusters_in_use_…`, `val_effective_clusters_…` and
    `val_agreement_…` with the mirrored images. It warns when a head has collapsed. Of several
    validation loaders the last one counts: lightly puts the bank of its kNN before it.

    Args:
        backbone: Any module that maps images (n, channels, height, width) to features that flatten
            to (n, feature_dim).
        feature_dim: Length of one feature vector.
        num_clusters: K of each head.
        normalize: L2-normalise features for the heads, see `MultiScaleClusterHead`, which trains
            better; not in the paper.
        loss: The loss, for options other than the defaults of `C2BINLoss`. It stays as it is: over
            several processes give `gather_distributed=True`, which the default loss has. It is not
            stored in checkpoints: give it again, like `backbone`, to `load_from_checkpoint`.
        against: What a view's assignments are contrasted with: those of the other view from the
            features of the `"follower"`, without gradient, which trains better; or of the
            `"runner"`, as in the paper.
        **byol: See `BYOL` (hidden_dim, projection_dim, follower_momentum, follower_schedule) and
            `Optimization`.

    Examples:
        >>> from torch import nn
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
        >>> model = C2BIN(backbone, feature_dim=8, num_clusters=(4, 6))
        >>> [tuple(p.shape) for p in model.assignments(torch.rand(5, 3, 2, 2))]
        [(5, 4), (5, 6)]
    """

    criterion: C2BINObjective

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        num_clusters: Sequence[int] = (32, 64, 128),
        normalize: bool = True,
        loss: C2BINLoss | None = None,
        against: Literal["runner", "follower"] = "follower",
        **byol: Any,
    ) -> None:
        super().__init__(backbone, feature_dim, **byol)
        if against not in ("runner", "follower"):
            raise ValueError(f"against must be 'runner' or 'follower', got {against!r}")
        self.against = against
        # Over one process gathering does nothing.
        self.criterion = C2BINObjective(
            feature_dim, num_clusters, normalize=normalize, gather_distributed=True
        )
        if loss is not None:
            self.criterion.loss = loss
        self.monitor = ClusterMonitor(self.cluster_head.num_clusters)

    @property
    def cluster_head(self) -> MultiScaleClusterHead:
        """The cluster heads, which train with the runner."""
        return self.criterion.head

    def setup(self, stage: str) -> None:
        """Say so, once, when a loss that was given does not see the whole global batch."""
        if self.trainer.world_size > 1 and not getattr(
            self.criterion.loss, "gather_distributed", True
        ):
            rank_zero_warn(
                "loss: gather_distributed is False, so each of the "
                f"{self.trainer.world_size} processes contrasts the clusters of its own images "
                "only; C2BINLoss(gather_distributed=True) contrasts those of the global batch."
            )

    def assignments(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return each head's soft assignments (n, K) of images (n, channels, height, width)."""
        assignments: tuple[Tensor, ...] = self.cluster_head(self(images))
        return assignments

    def on_train_batch_start(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Say so, once, when a head has more clusters than the global batch has images."""
        if batch_idx == 0 and self.current_epoch == 0 and self.trainer.is_global_zero:
            warn_if_more_clusters_than_images(
                self.cluster_head.num_clusters, len(batch[0][0]) * self.trainer.world_size
            )

    def configure_callbacks(self) -> Any:
        """Add none; keep Lightning from warning that there are no validation images: not needed.

        It is the one hook that comes before that warning.
        """
        warnings.filterwarnings("ignore", message=r".*but have no `val_dataloader`")
        return super().configure_callbacks()

    def on_validation_epoch_start(self) -> None:
        """Start the scores of a pass through the validation images."""
        super().on_validation_epoch_start()
        loaders = CombinedLoader(self.trainer.val_dataloaders).flattened
        self._watched = len(loaders) - 1
        self.monitor.reset(loaders[-1])

    def validation_step(
        self, batch: Sequence[Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take `(images, labels, ...)`, images (n, channels, height, width), labels (n,)."""
        super().validation_step(batch, batch_idx)
        if dataloader_idx == self._watched:
            self.watch(batch[0], batch[1], self(batch[0]))

    def watch(self, images: Tensor, labels: Tensor, features: Tensor) -> None:
        """Count validation images, of which the features are known, in the scores of the heads."""
        mirrored = self.assignments(images.flip(-1))
        self.monitor.update(self.cluster_head(features), labels, mirrored)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of each head."""
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking:
            # Equal on all ranks already; without sync_dist, Lightning warns of each of them.
            self.log_dict(self.monitor.compute(), sync_dist=True)

    def objective(self, branches: Branches) -> dict[str, Tensor]:
        """Return the total and its parts, and each head's effective number of clusters."""
        result = self.criterion(
            branches.predictions,
            branches.targets,
            branches.features,
            target_features=branches.followed if self.against == "follower" else None,
        )._asdict()
        with torch.no_grad():
            for i, assignments in enumerate(self.cluster_head(branches.features[0])):
                k = assignments.shape[1]
                # The regularizer is log K − H of the mean assignment, so exp(H) is K times exp of
                # its negative.
                result[f"effective_clusters_{i}_of_{k}"] = (
                    k * (-cluster_entropy_regularizer(assignments)).exp()
                )
        losses: dict[str, Tensor] = result
        return losses
