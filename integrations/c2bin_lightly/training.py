"""The four methods as LightningModules: logs, optimisation, schedules, resuming, cluster scores."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import get_weight_decay_parameters
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import Unpack

from c2bin_ext import C2BINLoss, C2BINObjective
from c2bin_ext._hosts import labelled, seed_epoch, steps_of, steps_of_epoch, two_views
from c2bin_ext.monitoring import ClusterMonitor, warn_if_more_clusters_than_images
from c2bin_lightly.methods import (
    BYOLMethod,
    C2BINMethod,
    Follower,
    Method,
    MoCoV2Method,
    SimCLRMethod,
)

__all__ = ["BYOL", "C2BIN", "MoCoV2", "Optimization", "SimCLR", "Trained", "trained_by_decay"]


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
            `"constant"`. The cosine needs a run whose number of steps is known.
        warmup_epochs: Linear warm-up from 0, in epochs, which need a loader with a length.
            Default 0.
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


class _ClusterScores(Callback):
    """Shows the validation images to the module's monitor and logs the scores of its heads."""

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say so, once, when a head has more clusters than the global batch has images."""
        if batch_idx == 0 and trainer.current_epoch == 0 and trainer.is_global_zero:
            images = len(two_views(batch)[0]) * trainer.world_size
            warn_if_more_clusters_than_images(module.monitor.num_clusters, images)

    def on_validation_epoch_start(self, trainer: Trainer, module: Any) -> None:
        """Start the scores of a pass through the validation images."""
        loaders = CombinedLoader(trainer.val_dataloaders).flattened
        self._watched = len(loaders) - 1
        module.monitor.reset(loaders[-1])

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        loader: int = 0,
    ) -> None:
        """Count the images of the last loader; `outputs` are their features, if at hand."""
        if loader != self._watched:
            return
        images, labels = labelled(batch)
        method: C2BINMethod = module.method
        with trainer.precision_plugin.val_step_context():
            features = outputs if isinstance(outputs, Tensor) else method(images)
            heads, mirrored = method.cluster_head(features), method.assignments(images.flip(-1))
        module.monitor.update(heads, labels, mirrored)

    def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """Log the scores of each head."""
        if not trainer.sanity_checking:
            # Equal on all ranks already; without sync_dist, Lightning warns of each of them.
            module.log_dict(module.monitor.compute(), sync_dist=True)


def _short_names(_: Any, state: dict[str, Any], prefix: str, __: Any) -> None:
    """Leave "method." out of the names of weights: they are those that evaluations look for."""
    long = f"{prefix}method."
    for name in [name for name in state if name.startswith(long)]:
        state[prefix + name[len(long) :]] = state.pop(name)


def _long_names(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Undo `_short_names`, before weights are loaded."""
    own = tuple(f"{prefix}{name}." for name, _ in module.named_children())
    for name in [name for name in state if name.startswith(prefix)]:
        if not name.startswith(own):
            state[f"{prefix}method.{name[len(prefix) :]}"] = state.pop(name)


class Trained(LightningModule):
    """A `Method` in Lightning: what trains, logs and resumes it.

    Parts of the method are attributes here too: `module.backbone` is `module.method.backbone`, and
    checkpoints name it `backbone.`.

    After `seed_everything` an epoch is drawn from (seed, epoch, rank): a run that resumes from the
    checkpoint of a whole epoch ends as the uninterrupted one would have.
    """

    method: Method
    monitor: ClusterMonitor | None = None

    def wrap(self, method: Method, optimization: Mapping[str, Any]) -> None:
        """Take the method and how to optimise it; the last line of every constructor."""
        unknown = sorted(set(optimization) - set(_DEFAULTS))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} got unknown arguments {unknown}; known: {sorted(_DEFAULTS)}"
            )
        options: dict[str, Any] = {**_DEFAULTS, **optimization}
        choices = {"optimizer": ("sgd", "lars", "adam"), "schedule": ("cosine", "constant")}
        for key, known in choices.items():
            if options[key] not in known:
                raise ValueError(f"{key} must be one of {known}, got {options[key]!r}")
        # A module in the hyperparameters would store the weights twice, and any object but plain
        # ones stops weights_only loading.
        self.save_hyperparameters(ignore=["backbone", "projector", "loss", "dataloader_kNN"])
        self.optimization = options
        self.method = method
        if isinstance(method, C2BINMethod):
            self.monitor = ClusterMonitor(method.cluster_head.num_clusters)
        module: Any = self
        module._register_state_dict_hook(_short_names)
        module._register_load_state_dict_pre_hook(_long_names, with_module=True)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "method":
                raise
            return getattr(self.method, name)

    def __setattr__(self, name: str, value: Any) -> None:
        method = self.__dict__.get("_modules", {}).get("method")
        if method is not None and name in method._modules:
            setattr(method, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (n, feature_dim) of images (n, channels, height, width)."""
        features: Tensor = self.method(images)
        return features

    def losses(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        """Return what to minimise under `"loss"` and what else to log beside it, all 0-dim."""
        return self.method.step(view0, view1)

    def setup(self, stage: str) -> None:
        """Make the loss see the whole global batch when there is more than one process."""
        if self.trainer.world_size > 1:
            self.method.span_processes(self.trainer.world_size)

    def configure_callbacks(self) -> Any:
        """Add the scores of cluster heads, if there are any."""
        if self.monitor is None:
            return []
        # The one hook before Lightning warns that there are no validation images: not needed.
        warnings.filterwarnings("ignore", message=r".*but have no `val_dataloader`")
        return [_ClusterScores()]

    def on_train_epoch_start(self) -> None:
        """Seed the epoch, if `seed_everything` asked for a reproducible run."""
        seed = os.environ.get("PL_GLOBAL_SEED")
        if seed is not None:
            seed_epoch(self.trainer, int(seed))

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Take `((view0, view1), ...)`, views (n, channels, height, width); labels are not read."""
        view0, view1 = two_views(batch)
        losses = self.losses(view0, view1)
        self.log_losses(losses, len(view0))
        return losses["loss"]

    def log_losses(self, losses: dict[str, Tensor], batch_size: int) -> None:
        """Log the means over an epoch, under `train_`; nothing is read before its end."""
        named = {f"train_{name}": value.detach() for name, value in losses.items()}
        self.log_dict(named, on_step=False, on_epoch=True, sync_dist=True, batch_size=batch_size)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the runner, then move the follower."""
        # Here and not in training_step: under gradient accumulation the follower moves once per
        # optimiser step.
        super().optimizer_step(*args, **kwargs)
        trainer = self.trainer
        self.method.move_follower(lambda: (trainer.global_step, steps_of(trainer, "γ")))

    def learning_rate(self) -> float:
        """Return the learning rate of the whole global batch."""
        rate: float = self.optimization["lr"]
        return rate

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters, those without weight decay in a group of their own."""
        decayed, undecayed = trained_by_decay([self])
        return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and its schedule, which may need a run whose length is known."""
        options = self.optimization
        groups = self.parameter_groups()
        common = {"lr": self.learning_rate(), "weight_decay": options["weight_decay"]}
        optimizer: torch.optim.Optimizer
        if options["optimizer"] == "adam":
            optimizer = torch.optim.Adam(groups, **common)
        else:
            kind = LARS if options["optimizer"] == "lars" else torch.optim.SGD
            optimizer = kind(groups, momentum=options["momentum"], **common)
        schedule = self._schedule(optimizer, self.trainer, options)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _schedule(self, optimizer: Any, trainer: Trainer, options: dict[str, Any]) -> Any:
        warmup = 0
        if self.method.follower_schedule == "cosine":
            steps_of(trainer, "follower_schedule='cosine'")  # needs them after each step
        if options["warmup_epochs"]:
            name = f"warmup_epochs={options['warmup_epochs']}"
            warmup = round(options["warmup_epochs"] * steps_of_epoch(trainer, name))
        if options["schedule"] == "constant":
            return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)))
        steps = steps_of(trainer, "schedule='cosine'")
        return CosineWarmupScheduler(
            optimizer, warmup_epochs=min(steps, warmup), max_epochs=steps, end_value=0.001
        )


class SimCLR(Trained):
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
        super().__init__()
        projector = SimCLRProjectionHead(feature_dim, hidden_dim, projection_dim)
        method = SimCLRMethod(backbone, projector, temperature)
        self.wrap(method, optimization)


class MoCoV2(Trained):
    """MoCo v2: negatives come from a queue of the follower's projections (Chen et al., 2020).

    Args:
        backbone, feature_dim, hidden_dim, projection_dim, temperature: As in `SimCLR`.
        queue_size: Projections kept as negatives. Much more than the data set holds makes every
            image its own negative.
        symmetric: Let each view be the query once, as lightly's CIFAR-10 benchmark does; False is
            the paper's form.
        follower_momentum: γ of Eq. 8.
        follower_schedule: `"constant"`, or `"cosine"` from γ to 1 over the run.
        **optimization: See `Optimization`.
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
        super().__init__()
        projector = MoCoProjectionHead(feature_dim, hidden_dim, projection_dim)
        criterion = NTXentLoss(temperature, memory_bank_size=(queue_size, projection_dim))
        follower = Follower(follower_momentum, follower_schedule)
        method = MoCoV2Method(backbone, projector, follower, criterion, symmetric)
        self.wrap(method, optimization)


class BYOL(Trained):
    """BYOL: predict the follower's projection of the other view; no negatives (Grill et al., 2020).

    Args:
        backbone, feature_dim, projection_dim: As in `SimCLR`.
        hidden_dim: Width of the hidden layer of projector and predictor.
        follower_momentum, follower_schedule: As in `MoCoV2`.
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
        super().__init__()
        projector = BYOLProjectionHead(feature_dim, hidden_dim, projection_dim)
        predictor = BYOLPredictionHead(projection_dim, hidden_dim, projection_dim)
        follower = Follower(follower_momentum, follower_schedule)
        method = BYOLMethod(backbone, projector, follower, predictor)
        self.wrap(method, optimization)


class C2BIN(Trained):
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
        backbone, feature_dim, hidden_dim, projection_dim: As in `BYOL`.
        num_clusters: K of each head.
        normalize: L2-normalise features for the heads, see `MultiScaleClusterHead`, which trains
            better; not in the paper.
        loss: The loss, for options other than the defaults of `C2BINLoss`. It stays as it is: over
            several processes give `gather_distributed=True`, which the default loss has. It is not
            stored in checkpoints: give it again, like `backbone`, to `load_from_checkpoint`.
        against: What a view's assignments are contrasted with: those of the other view from the
            features of the `"follower"`, without gradient, which trains better; or of the
            `"runner"`, as in the paper.
        follower_momentum, follower_schedule: As in `MoCoV2`.
        **optimization: See `Optimization`.

    Examples:
        >>> from torch import nn
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
        >>> model = C2BIN(backbone, feature_dim=8, num_clusters=(4, 6))
        >>> [tuple(p.shape) for p in model.assignments(torch.rand(5, 3, 2, 2))]
        [(5, 4), (5, 6)]
    """

    method: C2BINMethod

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        num_clusters: Sequence[int] = (32, 64, 128),
        normalize: bool = True,
        loss: C2BINLoss | None = None,
        against: Literal["runner", "follower"] = "follower",
        hidden_dim: int = 512,
        projection_dim: int = 512,
        follower_momentum: float = 0.99,
        follower_schedule: Literal["constant", "cosine"] = "constant",
        **optimization: Unpack[Optimization],
    ) -> None:
        super().__init__()
        projector = BYOLProjectionHead(feature_dim, hidden_dim, projection_dim)
        predictor = BYOLPredictionHead(projection_dim, hidden_dim, projection_dim)
        # Over one process gathering does nothing.
        objective = C2BINObjective(
            feature_dim, num_clusters, normalize=normalize, gather_distributed=True
        )
        if loss is not None:
            objective.loss = loss
        follower = Follower(follower_momentum, follower_schedule)
        method = C2BINMethod(backbone, projector, follower, predictor, objective, against)
        self.wrap(method, optimization)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Take `(images, labels, ...)`, of which the heads' scores are logged after the pass."""
