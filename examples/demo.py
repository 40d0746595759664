"""SimCLR, MoCo v2, BYOL and C2BIN on the same images, views, backbone, batches, epochs and seed; then one table.

    python examples/demo.py                                   scikit-learn's digits; nothing to download
    python examples/demo.py --dataset cifar10 --epochs 50     a torchvision data set
    python examples/demo.py --data FOLDER                     your own: FOLDER/{train,test}/<class>/, or FOLDER/<class>/

Ctrl-C at any time: the same command goes on where it stopped, and ends with the same numbers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import shutil
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by OpenMP when torch is loaded: threads that spin while they wait starve the loader's workers on few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import lightly
import numpy as np
import sklearn
import torch
import torchvision
from c2bin_lightly import BYOL, C2BIN, MoCoV2, SimCLR, evaluate
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import c2bin_ext
from _demo_data import TORCHVISION, DataError, EpochSampler, Images, Views, load, normalized, view_transform
from c2bin_ext.metrics import effective_clusters

# Everything that is not in this table is the same for all. Nothing here was tuned on the demo's images:
# optimisation, temperatures, follower and queue are those of lightly's CIFAR-10 benchmark (SGD at 0.06 per 128 images,
# momentum 0.9, weight decay 5e-4, cosine schedule; NT-Xent at 0.5 and, with the queue, 0.1; γ = 0.99 throughout);
# the clusters, the temperature 0.5 and the weights 2 and 1 of C2BIN are Table 5 of its paper and C2BINLoss's defaults.
OPTIMIZATION: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"}
LR_PER_IMAGE = 0.06 / 128
METHODS: dict[str, tuple[str, type[LightningModule], dict[str, Any]]] = {
    "simclr": ("SimCLR", SimCLR, {"hidden_dim": 512, "projection_dim": 128, "temperature": 0.5}),
    "mocov2": ("MoCo v2", MoCoV2, {"hidden_dim": 512, "projection_dim": 128, "temperature": 0.1,
                                   "symmetric": True, "follower_momentum": 0.99}),
    "byol": ("BYOL", BYOL, {"hidden_dim": 1024, "projection_dim": 256, "follower_momentum": 0.99}),
    "c2bin": ("C2BIN", C2BIN, {"hidden_dim": 1024, "projection_dim": 256, "follower_momentum": 0.99}),
}  # fmt: skip
FLOOR = "untrained"
EVALUATION_BATCH = 512
CURVE_POINTS, CURVE_TRAIN, CURVE_TEST = 12, 2000, 1000  # of the kNN curve: points, and images at most


class Residual(nn.Module):
    """Two 3×3 convolutions and a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def backbone(name: str, size: int) -> tuple[nn.Module, int]:
    """Return a fresh backbone for images of `size` pixels, and the length of its features."""
    if name == "small":
        widths = (32, 32, 64, 128, 256)
        stages = [Residual(i, o, 1 if i == o else 2) for i, o in zip(widths, widths[1:], strict=False)]
        stem = [nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()), widths[-1]
    net: torchvision.models.ResNet = getattr(torchvision.models, name)()
    features = net.fc.in_features
    net.fc = nn.Identity()  # type: ignore[assignment]
    if size <= 64:  # the usual stem for small images: ImageNet's would shrink them eightfold at once
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()  # type: ignore[assignment]
    return net, features


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What every training of this command shares."""

    args: argparse.Namespace
    images: Images
    out: Path
    overall: tqdm[Any]

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return len(self.images.train) // self.args.batch_size

    def folder(self, method: str, seed: int) -> Path:
        """Return where this method's files go."""
        return self.out / f"seed{seed}" / method

    def finished(self, method: str, seed: int) -> bool:
        """Say whether this method's result is there."""
        return (self.folder(method, seed) / "result.json").exists()

    def model(self, method: str, seed: int) -> LightningModule:
        """Return an untrained model: with one seed, every method starts from the same backbone."""
        torch.manual_seed(seed)
        net, features = backbone(self.args.backbone, self.images.size)
        _, kind, options = METHODS[method]
        options = dict(options)
        if method == "mocov2":
            options["queue_size"] = queue_size(len(self.images.train))
        if method == "c2bin":
            options["num_clusters"] = tuple(self.args.num_clusters)
        return kind(net, features, lr=LR_PER_IMAGE * self.args.batch_size, **OPTIMIZATION, **options)


def queue_size(images: int) -> int:
    """Return 4096, or less when that would hold most images of a small set more than once at a time."""
    return min(4096, max(64, images // 2))


class Progress(Callback):
    """Fixes the epoch's seed, keeps the curves and moves the bars."""

    def __init__(self, run: Run, label: str, seed: int) -> None:
        self.run, self.label, self.seed = run, label, seed
        self.curve: list[dict[str, float]] = []
        self.began = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = state_dict["curve"]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        done, steps = trainer.current_epoch, self.run.steps
        self.run.overall.update(done)
        self.bar = tqdm(total=trainer.max_epochs * steps, initial=done * steps, desc=self.label, unit="step",
                        position=1, leave=False, disable=self.run.overall.disable)  # fmt: skip

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        seed = (self.seed * 100_003 + trainer.current_epoch) % 2**32
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.bar.update()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 1
        row = {"epoch": epoch, "seconds": time.perf_counter() - self.began}
        row.update({name: float(value) for name, value in sorted(trainer.callback_metrics.items())})
        if trainer.is_global_zero and (epoch == epochs or epoch % max(1, round(epochs / CURVE_POINTS)) == 0):
            row["knn"] = self.knn(module)
        self.curve.append(row)
        self.bar.set_postfix(epoch=f"{epoch}/{epochs}", loss=f"{row['train_loss']:.3f}",
                             **({"kNN": f"{100 * row['knn']:.1f}"} if "knn" in row else {}))  # fmt: skip
        self.run.overall.update()

    def knn(self, module: LightningModule) -> float:
        """Return the kNN accuracy (k = 5) on at most CURVE_TRAIN and CURVE_TEST images, which is cheap."""
        train, test = (
            features_of(module.backbone, images[:: -(-len(images) // most)], labels[:: -(-len(images) // most)])
            for images, labels, most in (
                (self.run.images.train, self.run.images.train_labels, CURVE_TRAIN),
                (self.run.images.test, self.run.images.test_labels, CURVE_TEST),
            )
        )
        return evaluate.knn_accuracy(train, test, k=5)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class EpochCheckpoint(Checkpoint):
    """Writes everything a resumed run needs after each epoch; a kill in the middle leaves the last one whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        part = self.path.with_suffix(".part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, self.path)


def train(run: Run, method: str, seed: int) -> tuple[LightningModule, list[dict[str, float]], Trainer]:
    """Train one method, from its last finished epoch if there is one."""
    args, images, folder = run.args, run.images, run.folder(method, seed)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "last.ckpt"
    progress = Progress(run, METHODS[method][0], seed)
    trainer = Trainer(
        accelerator=args.accelerator, devices=args.devices, strategy="ddp" if args.devices > 1 else "auto",
        precision=args.precision, max_epochs=args.epochs, callbacks=[progress, EpochCheckpoint(checkpoint)],
        use_distributed_sampler=False, logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    sampler = EpochSampler(len(images.train), args.batch_size, seed, trainer.global_rank, args.devices)
    loader = DataLoader(
        Views(images.train, images.train_labels, view_transform(images, args.dataset), seed), sampler=sampler,
        batch_size=args.batch_size // args.devices, drop_last=True, num_workers=args.workers,
        persistent_workers=args.workers > 0, pin_memory=trainer.strategy.root_device.type == "cuda",
        prefetch_factor=4 if args.workers else None, worker_init_fn=one_thread,
    )  # fmt: skip
    model = run.model(method, seed)
    try:
        trainer.fit(model, loader, ckpt_path=checkpoint if checkpoint.exists() else None)
    except SystemExit:
        # Lightning turns Ctrl-C into an exit; here it has to reach the message that says how to go on.
        raise KeyboardInterrupt from None
    return model, progress.curve, trainer


def one_thread(worker: int) -> None:
    """Keep a loader's worker to one core, and let the parent alone handle Ctrl-C."""
    import signal

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- evaluation -------------------------------------------------------------------------------------------------------


def features_of(net: nn.Module, images: Tensor, labels: Tensor) -> evaluate.Features:
    """Return the features of images without augmentation."""
    batches = zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
    return evaluate.extract(net, batches, transform=normalized)


def scores_by(labels: Tensor, clusters: Tensor, assignments: Tensor, by: str) -> dict[str, Any]:
    """Return one row of clustering scores."""
    row: dict[str, Any] = {"by": by, "k": assignments.shape[1], **evaluate.clustering_scores(labels, clusters)}
    row["effective"] = effective_clusters(assignments)
    return row


def kmeans_scores(train: evaluate.Features, test: evaluate.Features, k: int, seed: int) -> dict[str, Any]:
    """Return the scores of k-means on the features, fitted on training images, on the test images."""
    clusters = evaluate.kmeans(train, test, k=min(k, len(train.labels)), seed=seed)
    return scores_by(test.labels, clusters, nn.functional.one_hot(clusters, k).double(), "k-means")


def assess(run: Run, model: LightningModule, seed: int, scales: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return every score of one model, and the arrays that the pictures need."""
    images = run.images
    train = features_of(model.backbone, images.train, images.train_labels)
    test = features_of(model.backbone, images.test, images.test_labels)
    probe = evaluate.linear_probe(train, test, seed=seed)
    result: dict[str, Any] = {
        "linear": probe.accuracy, "linear_lr": probe.lr,
        "knn5": evaluate.knn_accuracy(train, test, k=5), "knn200": evaluate.knn_accuracy(train, test, k=200),
        "clustering": [kmeans_scores(train, test, len(images.classes), seed)],
    }  # fmt: skip
    arrays: dict[str, Any] = {"test": test.features.cpu().numpy()}
    if isinstance(model, C2BIN):
        with torch.no_grad():
            heads = model.cluster_head(test.features)
        for i, assignments in enumerate(heads):
            result["clustering"].append(scores_by(test.labels, assignments.argmax(1), assignments.cpu(), "own head"))
            arrays[f"head{i}"] = assignments.cpu().numpy()
    result["clustering"] += [kmeans_scores(train, test, k, seed) for k in scales]
    return result, arrays


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def run_method(run: Run, method: str, seed: int) -> None:
    """Train and score one method, and keep its result; the untrained backbone is scored as it is."""
    folder = run.folder(method, seed)
    if run.finished(method, seed):
        run.overall.update(0 if method == FLOOR else run.args.epochs)
        return
    folder.mkdir(parents=True, exist_ok=True)
    curve: list[dict[str, float]] = []
    if method == FLOOR:
        model = run.model("simclr", seed)
    else:
        model, curve, trainer = train(run, method, seed)
        if not trainer.is_global_zero:
            return
        model.to(trainer.strategy.root_device)
    began = time.perf_counter()
    # The clusters of C2BIN's heads are to be compared with k-means of the same K on BYOL's features.
    result, arrays = assess(run, model, seed, tuple(run.args.num_clusters) if method == "byol" else ())
    result["evaluation_seconds"] = time.perf_counter() - began
    if curve:
        seconds = [row["seconds"] for row in curve]
        result |= {"seconds_per_epoch": statistics.median(seconds), "training_seconds": sum(seconds), "curve": curve}
    np.savez_compressed(folder / "arrays.npz", **arrays)
    write_atomically(folder / "result.json", json.dumps(result, indent=1))
    label = METHODS[method][0] if method in METHODS else "untrained backbone"
    took = f", {result['training_seconds']:.0f} s of training" if curve else ""
    tqdm.write(f"{label}, seed {seed}: kNN {100 * result['knn5']:.1f} %, linear probe {100 * result['linear']:.1f} %{took}")
