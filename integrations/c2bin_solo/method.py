"""C2BIN as a solo-learn method: its BYOL, plus cluster heads, plus what a restart needs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from solo.methods.base import BaseMethod
from solo.methods.byol import BYOL
from solo.utils.misc import omegaconf_select
from torch import Tensor

from c2bin_ext import C2BINObjective, MultiScaleClusterHead
from c2bin_ext._hosts import described, seed_epoch, steps_of, whole_file
from c2bin_ext.functional import bootstrap_alignment_loss
from c2bin_ext.monitoring import ClusterMonitor, warn_if_more_clusters_than_images

__all__ = ["C2BIN"]

# Table 5 of the paper.
_WIDTHS = {"proj_hidden_dim": 512, "proj_output_dim": 512, "pred_hidden_dim": 512}
_OBJECTIVE = {
    name: p.default
    for name, p in inspect.signature(C2BINObjective).parameters.items()
    if name != "in_features"
} | {"gather_distributed": True}  # which does nothing in one process
_AGAINST = ("follower", "runner")
_CHECKPOINT_KEY = "c2bin_method_kwargs"


def _plain(section: DictConfig) -> dict[str, Any]:
    return cast("dict[str, Any]", OmegaConf.to_container(section))


class _WholeFiles(TorchCheckpointIO):  # type: ignore[misc]
    """Writes checkpoints beside their place, then puts them there in one go.

    Lightning 2.1 writes into the file itself; killed meanwhile, it leaves one that nothing resumes.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        with whole_file(path) as part:
            super().save_checkpoint(checkpoint, str(part), storage_options)


class C2BIN(BYOL):  # type: ignore[misc]
    """C2BIN: solo-learn's BYOL whose backbone also learns to contrast clusters of the batch.

    Formula: `L = L_align + λ_clust Σ_K (L_bca + λ_ent L_ent)`, see `c2bin_ext.C2BINObjective`. The
    cluster heads act on the runner's backbone features. With small crops (multicrop), `L_align`
    is the mean over all pairs of a large crop, as the follower sees it, and any other crop, as the
    runner predicts it, which are the pairs of solo-learn's BYOL; clusters are contrasted between
    the two large crops, because a small crop need not show what the image is about.

    Beside solo-learn's own metrics it logs `train_alignment`, `train_contrast` and `train_entropy`
    and, on validation, the scores of `c2bin_ext.monitoring.ClusterMonitor` for every head.

    A resumed run draws the same batches and augmentations as one that was never interrupted: every
    epoch is seeded with (`seed`, epoch, rank).

    Args:
        cfg: Of solo-learn, with a section `momentum` and in `method_kwargs`, all optional, the
            arguments of `C2BINObjective` with its defaults, except that `gather_distributed` is on;
            and `proj_hidden_dim`, `proj_output_dim` and `pred_hidden_dim` of BYOL, 512 each.
            `against`: contrast the runner's clusters of a view with those of the other view from
            the `"follower"`, without gradient, which trains better; or from the `"runner"`, as in
            the paper.

    Raises:
        TypeError: An entry of `method_kwargs` of the wrong type.
        ValueError: An entry of `method_kwargs` that is unknown or out of range, or large crops that
            are not two.

    Examples:
        >>> from c2bin_solo import C2BIN
        >>> from omegaconf import OmegaConf
        >>> sections = {"backbone": {}, "optimizer": {}, "scheduler": {}}
        >>> cfg = OmegaConf.create(sections | {"method_kwargs": {"num_clusters": [10, 40]}})
        >>> C2BIN.add_and_assert_specific_cfg(cfg).method_kwargs.temperature
        0.1

    Source: C2BIN, Eq. 1-8; submitted to ICLR 2021.
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        if self.num_large_crops != 2:
            raise ValueError(
                "data.num_large_crops: expected 2, the two views whose clusters are contrasted, "
                f"got {self.num_large_crops}"
            )
        kwargs = _plain(self.cfg.method_kwargs)
        self.objective = C2BINObjective(
            self.features_dim, **{name: kwargs[name] for name in _OBJECTIVE}
        )
        self.cluster_monitor = ClusterMonitor(self.cluster_head.num_clusters)
        # OmegaConf's lists end up in the state of torch's older optimizers, and torch.load, which
        # main_linear calls, refuses them.
        self.extra_optimizer_args = _plain(self.cfg.optimizer.kwargs)

    @property
    def cluster_head(self) -> MultiScaleClusterHead:
        """The cluster heads, which train with the runner."""
        return self.objective.head

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fill in the defaults of `method_kwargs` and check every entry.

        Args:
            cfg: Of solo-learn; changed in place.

        Returns:
            `cfg`.

        Raises:
            TypeError: An entry of `method_kwargs` of the wrong type.
            ValueError: An entry of `method_kwargs` that is unknown or out of range.
        """
        cfg.momentum = omegaconf_select(cfg, "momentum", {})
        cfg = super(C2BIN, C2BIN).add_and_assert_specific_cfg(cfg)
        defaults: dict[str, Any] = _WIDTHS | _OBJECTIVE | {"against": _AGAINST[0]}
        unknown = sorted(set(cfg.method_kwargs) - set(defaults))
        if unknown:
            raise ValueError(
                f"method_kwargs: expected names from {sorted(defaults)}, got {unknown}"
            )
        for name, default in defaults.items():
            cfg.method_kwargs[name] = omegaconf_select(cfg, f"method_kwargs.{name}", default)
        kwargs = _plain(cfg.method_kwargs)
        for name in _WIDTHS:
            if type(kwargs[name]) is not int or kwargs[name] < 1:
                raise ValueError(
                    f"method_kwargs.{name}: expected an integer >= 1, got {kwargs[name]!r}"
                )
        if kwargs["against"] not in _AGAINST:
            raise ValueError(
                f"method_kwargs.against: expected one of {_AGAINST}, got {kwargs['against']!r}"
            )
        # The constructor checks the rest and names the argument.
        C2BINObjective(1, **{name: kwargs[name] for name in _OBJECTIVE})
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The parameter groups of BYOL, then the cluster heads'."""
        heads = {"name": "cluster_head", "params": self.cluster_head.parameters()}
        return [*super().learnable_params, heads]

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Return the outputs of BYOL and, under `"assignments"`, one (n, K) tensor per head."""
        out: dict[str, Any] = super().forward(images)
        return out | {"assignments": self.cluster_head(out["feats"])}

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Return the objective plus solo-learn's loss of the online classifier.

        Args:
            batch: `[indices, [crop, …], labels]`, crops (n, channels, height, width), large first.
            batch_idx: Not read.

        Returns:
            A 0-dim loss.
        """
        if (
            len(batch) != 3
            or not isinstance(batch[1], (list, tuple))
            or len(batch[1]) != self.num_crops
        ):
            raise ValueError(
                f"training batch: expected [indices, {self.num_crops} crops, labels], each crop "
                f"(n, channels, height, width), labels -1 if unlabelled; got {described(batch)}"
            )
        # The grandparent's: BYOL's own would add BYOL's loss.
        out = super(BYOL, self).training_step(batch, batch_idx)
        predictions, targets = out["p"], out["momentum_z"]
        fixed = None
        if self.cfg.method_kwargs.against == "follower":
            with torch.no_grad():
                fixed = [self.cluster_head(features) for features in out["momentum_feats"]]
        # The objective's own call, with the assignments that `forward` made.
        terms = self.objective.loss(
            predictions[:2], targets, out["assignments"], target_assignments=fixed
        )
        alignment = terms.alignment
        small = predictions[self.num_large_crops :]
        if small:
            seen = targets if self.objective.loss.symmetric_alignment else targets[1:]
            others = torch.stack([bootstrap_alignment_loss(p, z) for z in seen for p in small])
            alignment = (len(seen) * alignment + others.sum()) / (len(seen) + len(others))
        self.log_dict(
            {
                "train_alignment": alignment,
                "train_contrast": terms.contrast,
                "train_entropy": terms.entropy,
            },
            on_epoch=True,
            sync_dist=True,
        )
        # The classifier's mean over no labelled image is NaN; it stays in the graph for DDP.
        labelled = (batch[2] != -1).any()
        class_loss = torch.where(labelled, out["loss"], torch.zeros_like(out["loss"]))
        loss: Tensor = terms.loss + (alignment - terms.alignment) + class_loss
        return loss

    def base_validation_step(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Do what solo-learn does and let the monitor see the images and their mirror images."""
        out: dict[str, Any] = super().base_validation_step(images, labels)
        if not self.trainer.sanity_checking:
            mirrored = BaseMethod.multicrop_forward(self, images.flip(-1))["feats"]
            self.cluster_monitor.update(out["assignments"], labels, self.cluster_head(mirrored))
        return out

    def on_validation_epoch_start(self) -> None:
        """Start a new pass of the monitor."""
        self.cluster_monitor.reset(self.trainer.val_dataloaders)

    def on_validation_epoch_end(self) -> None:
        """Log solo-learn's metrics and the monitor's."""
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking:
            self.log_dict(self.cluster_monitor.compute(), sync_dist=True)

    def on_train_start(self) -> None:
        """Put solo-learn's momentum schedule where a resumed run left it."""
        super().on_train_start()
        updater = self.momentum_updater
        if updater.base_tau != updater.final_tau:
            # With a run of unknown length solo-learn's schedule stands still or swings.
            steps_of(self.trainer, "momentum.final_tau, which the momentum reaches at the end")
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # and not one of the user's choice
            strategy.checkpoint_io = _WholeFiles()
        self.last_step = self.trainer.global_step
        if self.last_step:
            self.momentum_updater.update_tau(
                self.last_step, self.trainer.estimated_stepping_batches
            )
        if self.trainer.is_global_zero:
            ranks = self.trainer.world_size if self.objective.loss.gather_distributed else 1
            warn_if_more_clusters_than_images(
                self.cluster_head.num_clusters, self.batch_size * ranks
            )

    def on_train_epoch_start(self) -> None:
        """Seed the epoch, so that a resumed one is drawn like the first time."""
        seed_epoch(self.trainer, self.cfg.get("seed") or 0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the options, for `on_load_checkpoint`."""
        checkpoint[_CHECKPOINT_KEY] = _plain(self.cfg.method_kwargs)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of other options: solo-learn's auto_resume does not compare them.

        Args:
            checkpoint: What `torch.load` gave.

        Raises:
            ValueError: If an entry of `method_kwargs` differs.
        """
        own = _plain(self.cfg.method_kwargs)
        theirs = checkpoint.get(_CHECKPOINT_KEY, own)
        differ = {name: (theirs.get(name), own[name]) for name in own}
        listed = [f"{name} {a!r} -> {b!r}" for name, (a, b) in differ.items() if a != b]
        if listed:
            raise ValueError(
                "method_kwargs: expected those that the checkpoint was trained with, got "
                f"{', '.join(listed)}. For a new run give another `name` or set "
                "auto_resume.enabled=False"
            )
