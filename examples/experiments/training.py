"""Training: a Lightning run that can be killed and resumed exactly."""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from c2bin_ext._hosts import epoch_checkpoint, whole_file
from experiments.data import Images
from experiments.evaluation import (
    Features,
    cluster_scores,
    extract,
    kmeans,
    lightly_knn,
)
from experiments.store import ExperimentError
from experiments.tensor_views import TensorViews
from experiments.views import EpochSampler, Views, normalized, seed_epoch

EVALUATION_BATCH = 512
# Of curves: how many points, and how many images at most the quick kNN and k-means are taken on.
CURVE_POINTS, CURVE_TRAIN, CURVE_TEST, KMEANS_TRAIN = 12, 2000, 1000, 10_000
Scored = bool | Literal["all"]


def loader_of(
    views: Dataset[Any],
    sampler: EpochSampler,
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    context: str | None = None,
) -> DataLoader[Any]:
    """Return the loader that trains: whole batches of views, workers that stay and read ahead."""
    return DataLoader(
        views,
        sampler=sampler,
        batch_size=batch_size,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        multiprocessing_context=context,
        worker_init_fn=ignore_interrupt,
    )


def features_of(net: nn.Module, images: Tensor, labels: Tensor) -> Features:
    """Return a backbone's features of uint8 images (n, 3, S, S), without augmentation."""
    batches = zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
    return extract(net, batches, transform=normalized)


def evenly(rows: Tensor, most: int) -> Tensor:
    """Return at most so many rows, evenly spaced."""
    return rows[:: -(-len(rows) // most)]


def quick_scores(module: LightningModule, images: Images) -> dict[str, float]:
    """Return the kNN accuracy, k = 5, on an evenly spaced part of the images."""
    net = module.get_submodule("backbone")
    train, test = (
        features_of(net, evenly(pixels, most), evenly(labels, most))
        for pixels, labels, most in (
            (images.train, images.train_labels, CURVE_TRAIN),
            (images.test, images.test_labels, CURVE_TEST),
        )
    )
    return {"knn": lightly_knn(train, test, k=5)}


def full_scores(module: LightningModule, images: Images) -> dict[str, float]:
    """Return kNN accuracies on all images, and the NMI of k-means and of the heads."""
    net = module.get_submodule("backbone")
    train = features_of(net, images.train, images.train_labels)
    test = features_of(net, images.test, images.test_labels)
    found = {"knn": lightly_knn(train, test, k=5), "knn200": lightly_knn(train, test, k=200)}
    part = Features(*(evenly(rows, KMEANS_TRAIN) for rows in train))
    clusters = [kmeans(part, test, len(images.classes), restarts=3)]
    names = ["kmeans_nmi"]
    for assignments in own_heads(module, test.features):
        clusters.append(assignments)
        names.append(f"nmi_of_{assignments.shape[1]}")
    scores = [cluster_scores(test.labels, each)["nmi"] for each in clusters]
    return found | dict(zip(names, scores, strict=True))


class Progress(Callback):
    """Fixes the seed of every epoch, keeps the curves and moves the bars."""

    def __init__(
        self, label: str, images: Images, seed: int, overall: tqdm[Any], scored: Scored = True
    ) -> None:
        self.label, self.images, self.seed, self.overall = label, images, seed, overall
        self.scored = scored
        self.curve: list[dict[str, float]] = []
        self.bar: tqdm[Any] | None = None
        self.began = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the curve so far."""
        return {"curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the curve so far from a checkpoint."""
        self.curve = state_dict["curve"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show where this method begins, or goes on."""
        done, epochs = trainer.current_epoch, trainer.max_epochs or 1
        if done and trainer.is_global_zero:
            tqdm.write(f"{self.label}, seed {self.seed}: going on after epoch {done} of {epochs}")
        self.overall.update(done)
        steps = int(trainer.num_training_batches)
        self.bar = tqdm(
            total=epochs * steps,
            initial=done * steps,
            desc=self.label,
            unit="step",
            position=1,
            leave=False,
            disable=self.overall.disable,
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed from (seed, epoch), so that a resumed run draws what an uninterrupted one draws."""
        seed_epoch(self.seed, trainer.current_epoch)
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the method's bar."""
        if self.bar is not None:
            self.bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the epoch's numbers, and now and then a kNN score, which is not in its time."""
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 1
        row: dict[str, float] = {"epoch": epoch, "seconds": time.perf_counter() - self.began}
        row.update({name: float(v) for name, v in sorted(trainer.callback_metrics.items())})
        if not math.isfinite(row["train_loss"]):
            raise ExperimentError(
                f"{self.label} diverged in epoch {epoch}: loss {row['train_loss']}"
            )
        shown = {"epoch": f"{epoch}/{epochs}", "loss": f"{row['train_loss']:.3f}"}
        often = max(1, round(epochs / CURVE_POINTS))
        due = self.scored and (epoch % often == 0 or epoch in (1, epochs))
        if trainer.is_global_zero and due:
            score = full_scores if self.scored == "all" else quick_scores
            row |= score(pl_module, self.images)
            shown["kNN"] = f"{100 * row['knn']:.1f}"
        self.curve.append(row)
        if self.bar is not None:
            self.bar.set_postfix(shown)
        self.overall.update()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Take the method's bar away."""
        if self.bar is not None:
            self.bar.close()


class Snapshots(Callback):
    """Keeps test features and assignments at some epochs."""

    def __init__(self, folder: Path, images: Images, epochs: Sequence[int]) -> None:
        self.folder, self.images, self.epochs = folder, images, epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the arrays of this epoch, if it is one of them."""
        epoch = trainer.current_epoch + 1
        if epoch in self.epochs:
            net = pl_module.get_submodule("backbone")
            test = features_of(net, self.images.test, self.images.test_labels)
            save_arrays(self.folder / f"epoch{epoch}.npz", pl_module, test)


def own_heads(model: LightningModule, features: Tensor) -> list[Tensor]:
    """Return what a model's cluster heads, if any, make of features (n, d), a (n, K) each."""
    head = getattr(model, "cluster_head", None)
    if head is None:
        return []
    # Batch norm would take in the images that are scored.
    training = head.training
    head.eval()
    with torch.no_grad():
        found = [*head(features)]
    head.train(training)
    return found


def save_arrays(path: Path, model: LightningModule, test: Features) -> None:
    """Write features and assignments so that the file is there whole or not at all."""
    heads = own_heads(model, test.features)
    arrays: dict[str, Any] = {f"head{i}": p.cpu() for i, p in enumerate(heads)}
    with whole_file(path) as part, part.open("wb") as file:
        np.savez_compressed(file, test=test.features.cpu().numpy(), **arrays)


def fit(
    model: LightningModule,
    label: str,
    images: Images,
    folder: Path,
    settings: Mapping[str, Any],
    args: argparse.Namespace,
    overall: tqdm[Any],
    *,
    views: Dataset[Any] | None = None,
    scored: Scored = True,
) -> tuple[list[dict[str, float]], bool]:
    """Train a model, from its last finished epoch if `folder` has one.

    Args:
        model: The method.
        label: Its name on the bars.
        images: What to train on.
        folder: Where the last finished epoch is kept.
        settings: Of the run, see `experiments.runs`.
        args: The machine: `accelerator`, `devices`, `precision`, and `workers` for each device.
        overall: The bar that moves by one an epoch.
        views: Views already made, keyed by (epoch, index); by default they are made on the way.
        scored: Take a kNN score now and then, for the curve; `"all"`: all that costs no training.

    Returns:
        The curve, one row an epoch, and whether this process is the one that evaluates.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
    """
    checkpoint, seed, batch_size = folder / "last.ckpt", settings["seed"], settings["batch_size"]
    progress = Progress(label, images, seed, overall, scored)
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        precision=args.precision,
        max_epochs=settings["epochs"],
        callbacks=[
            progress,
            Snapshots(folder, images, settings.get("snapshots", ())),
            epoch_checkpoint(checkpoint),
        ],
        use_distributed_sampler=False,  # EpochSampler shares batches out
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    resumes = checkpoint.exists()
    start = torch.load(checkpoint, weights_only=True)["epoch"] + 1 if resumes else 0
    sampler = EpochSampler(len(images.train), batch_size, seed, rank, args.devices, start)
    own = batch_size // args.devices
    loader: DataLoader[Any] | TensorViews
    if settings["views"] == "tensors":
        device = torch.device("cuda", rank) if args.accelerator == "gpu" else torch.device("cpu")
        crops = settings["options"].get("crops", 0)
        loader = TensorViews(images, settings["dataset"], sampler, own, seed, device, crops)
    else:
        workers = 0 if settings["views"] == "stored" else args.workers
        loader = loader_of(
            Views(images, settings["dataset"], seed) if views is None else views,
            sampler,
            batch_size=own,
            workers=workers,
            pin_memory=args.accelerator == "gpu",
            # A fork beside the threads of a process group can inherit a lock that nobody gives
            # back.
            context="spawn" if workers and args.devices > 1 else None,
        )
    try:
        trainer.fit(model, loader, ckpt_path=checkpoint if resumes else None)
    except SystemExit:
        # Lightning makes an exit of Ctrl-C; it has to reach the message that says how to go on.
        raise KeyboardInterrupt from None
    if trainer.is_global_zero:
        model.to(trainer.strategy.root_device)
    return progress.curve, trainer.is_global_zero


def ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C to the parent, which ends its workers; else each would print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
