"""SimCLR, MoCo v2, BYOL and C2BIN on the same images, views, backbone, batches, epochs and seed;
then one table.

    python examples/demo.py                                   scikit-learn's digits; nothing to
    download python examples/demo.py --dataset cifar10 --epochs 50     a torchvision data set python
    examples/demo.py --data FOLDER                     your own: FOLDER/{train,test}/<class>/, or
    FOLDER/<class>/

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

# Read by OpenMP when torch is loaded: threads that spin while they wait starve the loader's workers
# on few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import lightly
import numpy as np
import sklearn
import torch
import torchvision
from _demo_data import (
    TORCHVISION,
    DataError,
    EpochSampler,
    Images,
    Views,
    load,
    normalized,
    view_transform,
)
from c2bin_lightly import BYOL, C2BIN, MoCoV2, SimCLR, evaluate
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import c2bin_ext
from c2bin_ext.metrics import effective_clusters

# Everything that is not in this table is the same for all. Nothing here was tuned on the demo's
# images: optimisation, temperatures, follower and queue are those of lightly's CIFAR-10 benchmark
# (SGD at 0.06 per 128 images, momentum 0.9, weight decay 5e-4, cosine schedule; NT-Xent at 0.5 and,
# with the queue, 0.1; γ = 0.99 throughout); the clusters, the temperature 0.5 and the weights 2 and
# 1 of C2BIN are Table 5 of its paper and C2BINLoss's defaults.
OPTIMIZATION: dict[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "cosine",
}
LR_PER_IMAGE = 0.06 / 128
METHODS: dict[str, tuple[str, type[LightningModule], dict[str, Any]]] = {
    "simclr": ("SimCLR", SimCLR, {"hidden_dim": 512, "projection_dim": 128, "temperature": 0.5}),
    "mocov2": (
        "MoCo v2",
        MoCoV2,
        {
            "hidden_dim": 512,
            "projection_dim": 128,
            "temperature": 0.1,
            "symmetric": True,
            "follower_momentum": 0.99,
        },
    ),
    "byol": ("BYOL", BYOL, {"hidden_dim": 1024, "projection_dim": 256, "follower_momentum": 0.99}),
    "c2bin": (
        "C2BIN",
        C2BIN,
        {"hidden_dim": 1024, "projection_dim": 256, "follower_momentum": 0.99},
    ),
}
FLOOR = "untrained"
EVALUATION_BATCH = 512
CURVE_POINTS, CURVE_TRAIN, CURVE_TEST = (
    12,
    2000,
    1000,
)  # of the kNN curve: points, and images at most


class Residual(nn.Module):
    """Two 3×3 convolutions and a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def backbone(name: str, size: int) -> tuple[nn.Module, int]:
    """Return a fresh backbone for images of `size` pixels, and the length of its features."""
    if name == "small":
        widths = (32, 32, 64, 128, 256)
        stages = [
            Residual(i, o, 1 if i == o else 2) for i, o in zip(widths, widths[1:], strict=False)
        ]
        stem = [nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()), widths[-1]
    net: torchvision.models.ResNet = getattr(torchvision.models, name)()
    features = net.fc.in_features
    net.fc = nn.Identity()  # type: ignore[assignment]
    if (
        size <= 64
    ):  # the usual stem for small images: ImageNet's would shrink them eightfold at once
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()  # type: ignore[assignment]
    return net, features


# --- training
# ---------------------------------------------------------------------------------------------------------


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
        return kind(
            net, features, lr=LR_PER_IMAGE * self.args.batch_size, **OPTIMIZATION, **options
        )


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
        self.bar = tqdm(
            total=trainer.max_epochs * steps,
            initial=done * steps,
            desc=self.label,
            unit="step",
            position=1,
            leave=False,
            disable=self.run.overall.disable,
        )

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
        if trainer.is_global_zero and (
            epoch == epochs or epoch % max(1, round(epochs / CURVE_POINTS)) == 0
        ):
            row["knn"] = self.knn(module)
        self.curve.append(row)
        self.bar.set_postfix(
            epoch=f"{epoch}/{epochs}",
            loss=f"{row['train_loss']:.3f}",
            **({"kNN": f"{100 * row['knn']:.1f}"} if "knn" in row else {}),
        )
        self.run.overall.update()

    def knn(self, module: LightningModule) -> float:
        """Return the kNN accuracy (k = 5) on at most CURVE_TRAIN and CURVE_TEST images, which is cheap."""
        train, test = (
            features_of(
                module.backbone,
                images[:: -(-len(images) // most)],
                labels[:: -(-len(images) // most)],
            )
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


def train(
    run: Run, method: str, seed: int
) -> tuple[LightningModule, list[dict[str, float]], Trainer]:
    """Train one method, from its last finished epoch if there is one."""
    args, images, folder = run.args, run.images, run.folder(method, seed)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "last.ckpt"
    progress = Progress(run, METHODS[method][0], seed)
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        precision=args.precision,
        max_epochs=args.epochs,
        callbacks=[progress, EpochCheckpoint(checkpoint)],
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    sampler = EpochSampler(len(images.train), args.batch_size, seed, rank, args.devices)
    loader = DataLoader(
        Views(images.train, images.train_labels, view_transform(images, args.dataset), seed),
        sampler=sampler,
        batch_size=args.batch_size // args.devices,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=trainer.strategy.root_device.type == "cuda",
        prefetch_factor=4 if args.workers else None,
        worker_init_fn=one_thread,
    )
    model = run.model(method, seed)
    try:
        trainer.fit(model, loader, ckpt_path=checkpoint if checkpoint.exists() else None)
    except SystemExit:
        # Lightning turns Ctrl-C into an exit; here it has to reach the message that says how to go
        # on.
        raise KeyboardInterrupt from None
    return model, progress.curve, trainer


def one_thread(worker: int) -> None:
    """Keep a loader's worker to one core, and let the parent alone handle Ctrl-C."""
    import signal

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- evaluation
# -------------------------------------------------------------------------------------------------------


def features_of(net: nn.Module, images: Tensor, labels: Tensor) -> evaluate.Features:
    """Return the features of images without augmentation."""
    batches = zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
    return evaluate.extract(net, batches, transform=normalized)


def scores_by(labels: Tensor, clusters: Tensor, assignments: Tensor, by: str) -> dict[str, Any]:
    """Return one row of clustering scores."""
    row: dict[str, Any] = {
        "by": by,
        "k": assignments.shape[1],
        **evaluate.clustering_scores(labels, clusters),
    }
    row["effective"] = effective_clusters(assignments)
    return row


def kmeans_scores(
    train: evaluate.Features, test: evaluate.Features, k: int, seed: int
) -> dict[str, Any]:
    """Return the scores of k-means on the features, fitted on training images, on the test images."""
    clusters = evaluate.kmeans(train, test, k=min(k, len(train.labels)), seed=seed)
    return scores_by(test.labels, clusters, nn.functional.one_hot(clusters, k).double(), "k-means")


def assess(
    run: Run, model: LightningModule, seed: int, scales: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return every score of one model, and the arrays that the pictures need."""
    images = run.images
    train = features_of(model.backbone, images.train, images.train_labels)
    test = features_of(model.backbone, images.test, images.test_labels)
    probe = evaluate.linear_probe(train, test, seed=seed)
    result: dict[str, Any] = {
        "linear": probe.accuracy,
        "linear_lr": probe.lr,
        "knn5": evaluate.knn_accuracy(train, test, k=5),
        "knn200": evaluate.knn_accuracy(train, test, k=200),
        "clustering": [kmeans_scores(train, test, len(images.classes), seed)],
    }
    arrays: dict[str, Any] = {"test": test.features.cpu().numpy()}
    if isinstance(model, C2BIN):
        with torch.no_grad():
            heads = model.cluster_head(test.features)
        for i, assignments in enumerate(heads):
            result["clustering"].append(
                scores_by(test.labels, assignments.argmax(1), assignments.cpu(), "own head")
            )
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
    # The clusters of C2BIN's heads are to be compared with k-means of the same K on BYOL's
    # features.
    result, arrays = assess(
        run, model, seed, tuple(run.args.num_clusters) if method == "byol" else ()
    )
    result["evaluation_seconds"] = time.perf_counter() - began
    if curve:
        seconds = [row["seconds"] for row in curve]
        result |= {
            "seconds_per_epoch": statistics.median(seconds),
            "training_seconds": sum(seconds),
            "curve": curve,
        }
    np.savez_compressed(folder / "arrays.npz", **arrays)
    write_atomically(folder / "result.json", json.dumps(result, indent=1))
    label = METHODS[method][0] if method in METHODS else "untrained backbone"
    took = f", {result['training_seconds']:.0f} s of training" if curve else ""
    tqdm.write(
        f"{label}, seed {seed}: kNN {100 * result['knn5']:.1f} %, linear probe {100 * result['linear']:.1f} %{took}"
    )


# --- the report
# -------------------------------------------------------------------------------------------------------


def mean_and_spread(values: list[float], form: str, scale: float = 1.0) -> str:
    """Return the mean and, over several seeds, ± the standard deviation."""
    text = format(scale * statistics.fmean(values), form)
    return f"{text} ± {format(scale * statistics.stdev(values), form)}" if len(values) > 1 else text


def table(results: dict[str, list[dict[str, Any]]], classes: int) -> str:
    """Return the one table, as Markdown that reads as plain text too; `results` holds one entry per seed."""
    knn = "kNN k={}".format
    head = [
        "method",
        "linear probe",
        knn(5),
        knn(200),
        "clusters by",
        "NMI",
        "ACC",
        "purity",
        "ARI",
        "in use",
        "effective",
        "s/epoch",
    ]
    rows = []
    for method, runs in results.items():
        label = METHODS[method][0] if method in METHODS else "untrained"
        for i in range(len(runs[0]["clustering"])):
            parts = [run["clustering"][i] for run in runs]
            by, k = parts[0]["by"], parts[0]["k"]
            cells = [label if i == 0 else ""]
            cells += [
                mean_and_spread([r[key] for r in runs], ".1f", 100) if i == 0 else ""
                for key in ("linear", "knn5", "knn200")
            ]
            cells += [
                f"{by}, K={k}"
                + (" (classes)" if by == "k-means" and k == classes and i == 0 else "")
            ]
            cells += [
                mean_and_spread([p[key] for p in parts], ".3f")
                for key in ("nmi", "acc", "purity", "ari")
            ]
            cells += [mean_and_spread([p["in_use"] for p in parts], ".0f")]
            cells += [mean_and_spread([p["effective"] for p in parts], ".1f")]
            timed = i == 0 and "seconds_per_epoch" in runs[0]
            cells += [
                mean_and_spread([r["seconds_per_epoch"] for r in runs], ".1f") if timed else ""
            ]
            rows.append(cells)
    widths = [max(len(row[c]) for row in [head, *rows]) for c in range(len(head))]
    left = (0, 4)

    def line(cells: list[str]) -> str:
        padded = [
            c.ljust(w) if i in left else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = (
        "| "
        + " | ".join("-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths))
        + " |"
    )
    return "\n".join([line(head), rule, *map(line, rows)])


def notes_on(run: Run) -> list[str]:
    """Return what has to be known to read the table."""
    args, images = run.args, run.images
    k = min(200, len(images.train))
    clipped = f" (cut to {k}: there are no more training images)" if k < 200 else ""
    seeds = (
        f"seeds {', '.join(map(str, args.seeds))}, mean ± standard deviation"
        if len(args.seeds) > 1
        else f"seed {args.seeds[0]}"
    )
    lines = [
        f"{images.source}: {len(images.train)} training and {len(images.test)} test images of {images.size} × "
        f"{images.size} pixels, {len(images.classes)} classes; backbone {args.backbone}, {args.epochs} epochs, batch "
        f"{args.batch_size}, {seeds}.",
        *images.notes,
        "Every score is of test images; features are the backbone's, frozen, without augmentation. Linear probe: "
        "learning rate chosen on a fifth of the training images. kNN: lightly's, cosine, temperature 0.1, k = 5 and "
        f"k = 200{clipped}.",
        "k-means: fitted on L2-normalised training features. Own head: the cluster a C2BIN head finds most likely. ACC "
        "matches clusters one to one with classes, so it is low by design when K is far above the number of classes; "
        "purity lets each cluster stand for its commonest class, and grows with K: compare both at equal K. In use: "
        "clusters with a test image. Effective: exp of the entropy of the mean assignment, K when balanced, 1 when "
        "collapsed.",
        "untrained: the same backbone before any training, the floor.",
    ]
    return [line for line in lines if line]


def versions() -> dict[str, str]:
    """Return the versions that decide the numbers."""
    modules = {
        "torch": torch,
        "torchvision": torchvision,
        "lightly": lightly,
        "numpy": np,
        "scikit-learn": sklearn,
        "c2bin_ext": c2bin_ext,
    }
    return {"python": platform.python_version()} | {
        name: str(m.__version__) for name, m in modules.items()
    }


def hardware() -> dict[str, Any]:
    """Return what the times were taken on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = [
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = named[0].split(":", 1)[1].strip() if named else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def report(run: Run, settings: dict[str, Any], began: float) -> str:
    """Write results.json, results.md and the pictures of what is finished, and return the table with its notes."""
    args = run.args
    order = [m for m in (FLOOR, *METHODS) if m == FLOOR or m in args.methods]
    results = {
        m: [
            json.loads((run.folder(m, s) / "result.json").read_text(encoding="utf-8"))
            for s in args.seeds
        ]
        for m in order
    }
    text = "\n\n".join([table(results, len(run.images.classes)), *notes_on(run)])
    everything = {
        "settings": settings,
        "methods": {m: METHODS[m][2] for m in args.methods},
        "seeds": args.seeds,
        "classes": run.images.classes,
        "corrupt_files": len(run.images.corrupt),
        "corrupt": run.images.corrupt,
        "notes": run.images.notes,
        "versions": versions(),
        "hardware": hardware(),
        "seconds_of_this_call": time.perf_counter() - began,
        "results": {
            m: dict(zip(map(str, args.seeds), runs, strict=True)) for m, runs in results.items()
        },
    }
    write_atomically(run.out / "results.json", json.dumps(everything, indent=1))
    write_atomically(run.out / "results.md", text + "\n")

    # Imported late: matplotlib takes a second that --help and a wrong argument need not wait for.
    import _demo_pictures as pictures

    seed = args.seeds[0]
    labels = {m: METHODS[m][0] if m in METHODS else "untrained" for m in order}
    arrays = {m: dict(np.load(run.folder(m, seed) / "arrays.npz")) for m in order}
    pictures.curves(
        run.out / "curves.png",
        {labels[m]: results[m][0]["curve"] for m in order if m != FLOOR},
        len(run.images.test),
    )
    pictures.tsne(
        run.out / "tsne.png",
        {labels[m]: arrays[m]["test"] for m in order},
        run.images.test_labels.numpy(),
        run.images.classes,
        seed,
    )
    if "c2bin" in args.methods:
        pictures.clusters(
            run.out / "clusters.png",
            run.images.test,
            run.images.test_labels.numpy(),
            run.images.classes,
            arrays["c2bin"]["head0"],
        )
    return text


# --- the command
# ------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake ends in argparse's one-line message."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="FOLDER/train/<class>/ and FOLDER/test/<class>/ (or val/), or FOLDER/<class>/, which is split",
    )
    data.add_argument(
        "--dataset",
        choices=["digits", *TORCHVISION],
        help="scikit-learn's digits (default), or downloaded through torchvision",
    )
    data.add_argument(
        "--data-root", type=Path, default=Path("data"), help="where downloads go (default: ./data)"
    )
    data.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="shorter side is scaled to this, then cut square (default: digits 16, stl10 64, others 32)",
    )
    data.add_argument(
        "--limit", type=int, metavar="N", help="at most N training images, stratified"
    )
    data.add_argument(
        "--limit-test", type=int, metavar="N", help="at most N test images, stratified"
    )
    data.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave unreadable images out instead of stopping",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="default: all four"
    )
    training.add_argument(
        "--backbone",
        choices=["small", "resnet18", "resnet34", "resnet50"],
        default="small",
        help="small: nine convolutions, for CPUs (default); or torchvision's",
    )
    training.add_argument("--epochs", type=int, help="default: 30")
    training.add_argument("--batch-size", type=int, help="of all devices together (default: 128)")
    training.add_argument(
        "--num-clusters",
        type=int,
        nargs="+",
        metavar="K",
        default=[32, 64, 128],
        help="of C2BIN's heads (default: 32 64 128)",
    )
    training.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        default=[0],
        help="several give mean ± standard deviation (default: 0)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    machine.add_argument(
        "--devices",
        type=int,
        default=1,
        help="more than one: distributed data parallel (default: 1)",
    )
    machine.add_argument(
        "--precision",
        choices=["32-true", "bf16-mixed", "16-mixed"],
        help="default: bf16-mixed on a GPU, 32-true on a CPU",
    )
    machine.add_argument(
        "--workers", type=int, help="processes that make views (default: depends on the cores)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="throw away what a run with other settings left in --out",
    )
    output.add_argument(
        "--smoke",
        action="store_true",
        help="seconds instead of minutes: 320 images, 2 epochs; checks that all works, the scores mean nothing",
    )
    args = parser.parse_args(argv)

    if args.data and args.dataset:
        parser.error("--data and --dataset exclude each other")
    args.dataset = args.dataset or ("folder" if args.data else "digits")
    if args.smoke:
        args.limit, args.limit_test = args.limit or 320, args.limit_test or 100
    args.epochs = (2 if args.smoke else 30) if args.epochs is None else args.epochs
    args.batch_size = 128 if args.batch_size is None else args.batch_size
    for name, least in {
        "epochs": 1,
        "batch_size": 2,
        "devices": 1,
        "image_size": 8,
        "limit": 1,
        "limit_test": 1,
        "workers": 0,
    }.items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if min(args.num_clusters) < 2:
        parser.error(f"--num-clusters must each be at least 2, got {min(args.num_clusters)}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds must be different whole numbers, 0 or more")
    if args.batch_size % args.devices:
        parser.error(
            f"--batch-size {args.batch_size} must be a multiple of --devices {args.devices}"
        )
    gpus = torch.cuda.device_count()
    if args.accelerator == "auto":
        args.accelerator = "gpu" if gpus else "cpu"
    if args.accelerator == "gpu" and gpus < args.devices:
        parser.error(f"--accelerator gpu with --devices {args.devices}: torch sees {gpus} GPUs")
    args.precision = args.precision or ("bf16-mixed" if args.accelerator == "gpu" else "32-true")
    args.methods = [m for m in METHODS if m in args.methods]
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if args.workers is None:
        args.workers = min(
            8,
            max(
                1,
                cores // args.devices
                - (0 if args.accelerator == "gpu" else cores // args.devices // 2),
            ),
        )
    return args


def settings_of(args: argparse.Namespace, images: Images) -> dict[str, Any]:
    """Return everything that decides a method's numbers; methods and seeds may be added to an --out later."""
    names = (
        "dataset",
        "backbone",
        "epochs",
        "batch_size",
        "num_clusters",
        "precision",
        "devices",
        "accelerator",
    )
    return {
        **{name: getattr(args, name) for name in names},
        "source": images.source,
        "image_size": images.size,
        "images": [len(images.train), len(images.test)],
        "pixels": images.fingerprint(),
        "lr": LR_PER_IMAGE * args.batch_size,
        "optimization": OPTIMIZATION,
        "methods": {m: METHODS[m][2] for m in METHODS},
        "queue_size": queue_size(len(images.train)),
        "versions": {name: versions()[name] for name in ("torch", "lightly", "c2bin_ext")},
    }


def claim(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make `out` ours, or stop when it holds results of other settings or somebody else's files."""
    stored = out / "settings.json"
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file")
    if stored.exists():
        before = json.loads(stored.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(settings))
        odd = [
            f"{k} was {before.get(k)}, is {now.get(k)}"
            for k in sorted({*before, *now})
            if before.get(k) != now.get(k)
        ]
        if not odd:
            return
        if not overwrite:
            raise DataError(
                f"{out} holds results of other settings ({'; '.join(odd)}): choose another --out, or "
                "throw them away with --overwrite"
            )
        for folder in out.glob("seed*"):
            shutil.rmtree(folder)
        for name in (
            "settings.json",
            "results.json",
            "results.md",
            "curves.png",
            "tsne.png",
            "clusters.png",
        ):
            (out / name).unlink(missing_ok=True)
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"--out {out} is not empty and holds nothing of this demo: choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(stored, json.dumps(settings, indent=1))
    except OSError as error:
        raise DataError(f"cannot write to --out {out}: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    began = time.perf_counter()
    args = parse(argv)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    # Advice for other machines and other loaders than this script's own.
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    # Lightning's own use of a torch function on its way out; nothing here can change it.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*", module=r"pytorch_lightning.*")
    # Under DDP every further process runs this script again from the top; only the first writes and
    # speaks.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    run: Run | None = None
    try:
        images = load(
            args.data,
            args.dataset,
            args.data_root,
            args.image_size,
            args.limit,
            args.limit_test,
            args.skip_corrupt,
        )
        if len(images.train) < args.batch_size:
            raise DataError(
                f"only {len(images.train)} training images, less than one batch of {args.batch_size}: "
                "use a smaller --batch-size or more images"
            )
        settings = settings_of(args, images)
        if first:
            claim(args.out, settings, args.overwrite)
        if args.accelerator == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // args.devices))
        todo = [(method, seed) for seed in args.seeds for method in (FLOOR, *args.methods)]
        if first:
            print(
                f"{images.source}: {len(images.train)} training, {len(images.test)} test images, "
                f"{len(images.classes)} classes. Results go to {args.out}",
                flush=True,
            )
            for note in images.notes:
                print(note, flush=True)
        epochs = args.epochs * len(args.methods) * len(args.seeds)
        with tqdm(
            total=epochs,
            desc="all methods",
            unit="epoch",
            position=0,
            disable=None if first else True,
        ) as bar:
            run = Run(args, images, args.out, bar)
            for method, seed in todo:
                run_method(run, method, seed)
        if first:
            print(
                f"\n{report(run, settings, began)}\n\n{time.perf_counter() - began:.0f} s; tables, curves.png, tsne.png "
                f"and clusters.png are in {args.out}"
            )
    except DataError as error:
        if first:
            print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            done = [
                f"{METHODS[m][0]} (seed {s})"
                for s in args.seeds
                for m in args.methods
                if run and run.finished(m, s)
            ]
            print(
                f"\nInterrupted. Finished and kept in {args.out}: {', '.join(done) or 'nothing yet'}. "
                "The same command goes on from the last finished epoch.",
                file=sys.stderr,
            )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
