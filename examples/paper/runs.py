"""Trained runs: made once for each (method, settings, seed), kept, and read by every experiment."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _demo_data import DemoError, Images, StoredViews, Views, limited, load, view_transform
from _demo_report import versions
from _demo_training import features_of, fit
from c2bin_explore.backbones import backbone
from c2bin_lightly import BYOL, C2BIN, MoCoV2, SimCLR
from demo import (
    LR_PER_IMAGE,
    METHODS,
    OPTIMIZATION,
    common_scores,
    own_heads,
    queue_size,
    write,
)
from pytorch_lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

from c2bin_ext import C2BINLoss
from c2bin_ext.metrics import retrieval_precision
from paper.budgets import Budget
from paper.methods import MoCo, OracleSimCLR
from paper.probe import LEARNING_RATES, linear_evaluation
from paper.subsets import thinned, with_superclasses

# The floor: what the backbone gives before any training.
FLOOR = "untrained"
KINDS: dict[str, tuple[str, type[LightningModule]]] = {
    FLOOR: (FLOOR, SimCLR),
    "simclr": ("SimCLR", SimCLR),
    "moco": ("MoCo", MoCo),
    "mocov2": ("MoCo v2", MoCoV2),
    "byol": ("BYOL", BYOL),
    "c2bin": ("C2BIN", C2BIN),
    "oracle": ("SimCLR, other classes", OracleSimCLR),
}
PRECISION_AT = (1, 2, 5, 10, 20, 50, 100)
Result = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """One row of an experiment, whatever the seed.

    Attributes:
        method: Key of `KINDS`.
        clusters: Of C2BIN's heads.
        rate: Balance rate of the training images.
        clustering: The recipe of Table 10 in place of Table 5's.
    """

    method: str
    clusters: tuple[int, ...] = ()
    rate: float = 1.0
    clustering: bool = False

    @property
    def label(self) -> str:
        """Return the name for people."""
        heads = f" {{{', '.join(map(str, self.clusters))}}}" if self.clusters else ""
        rate = f", rate {self.rate:g}" if self.rate != 1 else ""
        return f"{KINDS[self.method][0]}{heads}{rate}"


class Snapshots(Callback):
    """Keeps what Figure 5 shows: test features and assignments at some epochs."""

    def __init__(self, folder: Path, images: Images, epochs: Sequence[int]) -> None:
        self.folder, self.images, self.epochs = folder, images, epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the arrays of this epoch, if it is one of them."""
        epoch = trainer.current_epoch + 1
        if epoch in self.epochs:
            save_arrays(self.folder / f"epoch{epoch}.npz", test_arrays(pl_module, self.images))


def test_arrays(model: LightningModule, images: Images) -> dict[str, Any]:
    """Return the test features (m, d), and the assignments (m, K) of each head."""
    test = features_of(model.backbone, images.test, images.test_labels).features
    arrays = {"test": test.cpu().numpy()}
    arrays |= {f"head{i}": p.cpu().numpy() for i, p in enumerate(own_heads(model, test))}
    return arrays


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write arrays so that the file is there whole or not at all."""
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, **arrays)
    part.replace(path)


class Lab:
    """The images, the settings and the results folder of one command."""

    def __init__(self, args: argparse.Namespace, budget: Budget) -> None:
        self.args, self.budget, self.seeds = args, budget, list(args.seeds)
        whole = load(
            args.data, args.dataset, args.data_root, args.image_size, args.skip_corrupt, {}
        )
        limits = {"train": budget.limit, "test": budget.limit_test}
        self._images = limited(whole, limits)
        self._superclasses = (
            limited(with_superclasses(whole), limits) if args.dataset == "cifar100" else None
        )
        self._subsets: dict[tuple[bool, float, int], Images] = {}
        self._digests: dict[tuple[bool, float, int], str] = {}
        self.used: dict[str, dict[str, Any]] = {}  # settings of the runs of this experiment
        name = args.data.resolve().name if args.data else args.dataset
        self.out = Path(args.out) / f"{name}-{budget.name}"

    def images(self, clustering: bool = False, rate: float = 1.0, seed: int = 0) -> Images:
        """Return the images that a run is trained and scored on."""
        key = (clustering, rate, seed)
        if key not in self._subsets:
            base = self._superclasses if clustering and self._superclasses else self._images
            self._subsets[key] = thinned(base, rate, seed)
        return self._subsets[key]

    def settings(self, spec: Spec, seed: int) -> dict[str, Any]:
        """Return all that decides a run's numbers."""
        images = self.images(spec.clustering, spec.rate, seed)
        key = (spec.clustering, spec.rate, seed)
        if key not in self._digests:
            self._digests[key] = images.fingerprint()
        budget = self.budget
        batch = budget.clustering_batch_size if spec.clustering else budget.batch_size
        # A thinned set may hold less than one batch.
        batch = min(batch, len(images.train))
        if spec.clustering:  # Table 10
            rate: dict[str, Any] = {"optimizer": "adam", "lr": 3e-4, "weight_decay": 0.0}
        elif budget.papers_optimizer:  # Table 5
            rate = {"optimizer": "lars", "lr": 0.2, "weight_decay": 1e-6, "momentum": 0.9}
            rate |= {"schedule": "constant"}
        else:
            rate = OPTIMIZATION | {"lr": LR_PER_IMAGE * batch}
        options: dict[str, Any] = dict(METHODS["simclr"][2])
        if spec.method in ("moco", "mocov2"):
            options = dict(METHODS["mocov2"][2]) | {"queue_size": queue_size(len(images.train))}
        elif spec.method in ("byol", "c2bin"):  # the MLP(512, 512) of Tables 5 and 10
            momentum = 0.995 if spec.clustering else 0.99
            options = {"hidden_dim": 512, "projection_dim": 512, "follower_momentum": momentum}
        if spec.method == "moco":
            del options["hidden_dim"]
        epochs = budget.clustering_epochs if spec.clustering else budget.epochs
        loss: dict[str, Any] = {}
        if spec.method == "c2bin":
            options |= {"num_clusters": spec.clusters, "against": "runner", "normalize": False}
            loss = {"cluster_weight": 2.0, "entropy_weight": 1.0, "temperature": 0.5}  # Table 5
            if spec.clustering:  # Table 10
                loss = {"cluster_weight": 1.0, "entropy_weight": 1.0, "temperature": 1.0}
            loss["formulas"] = self.args.formulas
        return {
            "method": spec.method,
            "seed": seed,
            "recipe": "Table 10" if spec.clustering else "Table 5",
            "balance_rate": spec.rate,
            "source": images.source,
            "dataset": self.args.dataset,
            "images": [len(images.train), len(images.test)],
            "image_size": images.size,
            "pixels": self._digests[key],
            "backbone": budget.clustering_backbone if spec.clustering else budget.backbone,
            "epochs": 0 if spec.method == FLOOR else epochs,
            "batch_size": batch,
            "precision": self.args.precision,
            "optimization": rate,
            "options": options,
            "loss": loss,
            "probe_epochs": budget.probe_epochs,
            "snapshots": list(budget.snapshots) if spec.clustering else [],
        } | {name: versions()[name] for name in ("torch", "lightly", "c2bin_ext")}

    def folder(self, spec: Spec, seed: int) -> Path:
        """Return where a run is kept: its name and a digest of its settings."""
        settings = self.settings(spec, seed)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        parts = ["clustering" if spec.clustering else "features", spec.method]
        parts += [f"k{k}" for k in spec.clusters] + (
            [f"rate{spec.rate:g}"] if spec.rate > 1 else []
        )
        return self.out / "runs" / f"{'-'.join(parts)}-seed{seed}-{digest}"

    def results(self, specs: Sequence[Spec]) -> dict[Spec, list[Result]]:
        """Return the results of every spec, one per seed; train what is not there yet."""
        pairs = [(spec, seed) for seed in self.seeds for spec in specs]
        missing = [pair for pair in pairs if not (self.folder(*pair) / "result.json").exists()]
        if len(missing) < len(pairs):
            tqdm.write(f"{len(pairs) - len(missing)} of {len(pairs)} runs are there already")
        self.used |= {self.folder(*pair).name: self.settings(*pair) for pair in pairs}
        epochs = sum(self.settings(*pair)["epochs"] for pair in missing)
        with tqdm(total=epochs, desc="all", unit="epoch", position=0, disable=None) as overall:
            for number, (spec, seed) in enumerate(missing, 1):
                self.train(spec, seed, overall)
                tqdm.write(f"run {number} of {len(missing)}: {spec.label}, seed {seed}")
        return {
            spec: [
                json.loads((self.folder(spec, seed) / "result.json").read_text(encoding="utf-8"))
                for seed in self.seeds
            ]
            for spec in specs
        }

    def arrays(self, spec: Spec, name: str = "final") -> dict[str, Any]:
        """Return the arrays of a spec's first seed."""
        return dict(np.load(self.folder(spec, self.seeds[0]) / f"{name}.npz"))

    def model(self, spec: Spec, seed: int) -> LightningModule:
        """Return an untrained model; with one seed, every method starts from the same backbone."""
        settings = self.settings(spec, seed)
        torch.manual_seed(seed)
        net, features = backbone(settings["backbone"], settings["image_size"])
        more: dict[str, Any] = {}
        if spec.method == "c2bin":
            weights = {k: v for k, v in settings["loss"].items() if k != "formulas"}
            printed = self.args.formulas == "printed"
            more["loss"] = C2BINLoss.paper(**weights) if printed else C2BINLoss(**weights)
        kind = KINDS[spec.method][1]
        return kind(net, features, **settings["optimization"], **settings["options"], **more)

    def train(self, spec: Spec, seed: int, overall: tqdm[Any]) -> None:
        """Train a run from its last finished epoch, score it and keep everything."""
        settings, folder = self.settings(spec, seed), self.folder(spec, seed)
        images = self.images(spec.clustering, spec.rate, seed)
        if settings["batch_size"] < 2:
            raise DemoError(f"{spec.label}: {len(images.train)} training images are too few")
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "settings.json", json.dumps(settings, indent=1))
        model, epochs = self.model(spec, seed), settings["epochs"]
        curve = list[dict[str, float]]()
        if epochs:
            curve, _ = fit(
                model,
                spec.label,
                images,
                folder / "last.ckpt",
                seed,
                overall,
                dataset=self.args.dataset,
                epochs=epochs,
                batch_size=settings["batch_size"],
                accelerator=self.args.accelerator,
                devices=1,
                precision=self.args.precision,
                workers=0 if self.budget.stored_views else self.args.workers,
                views=self.views(images, seed, epochs) if self.budget.stored_views else None,
                callbacks=[Snapshots(folder, images, settings["snapshots"])],
                scored=False,
            )
        result = self.score(model, images, seed)
        result["training_seconds"] = sum(row["seconds"] for row in curve)
        result["curve"] = curve
        save_arrays(folder / "final.npz", test_arrays(model, images))
        write(folder / "result.json", json.dumps(result, indent=1))

    def views(self, images: Images, seed: int, epochs: int) -> StoredViews:
        """Return the stored views of these images for a seed."""
        folder = self.out / "views"
        folder.mkdir(parents=True, exist_ok=True)
        views = Views(
            images.train, images.train_labels, view_transform(images, self.args.dataset), seed
        )
        path = folder / f"{images.fingerprint()}-seed{seed}-{epochs}epochs.npy"
        return StoredViews(path, views, epochs, images.size)

    def score(self, model: LightningModule, images: Images, seed: int) -> dict[str, Any]:
        """Return every score that any experiment reads, of the frozen features."""
        began = time.perf_counter()
        train = features_of(model.backbone, images.train, images.train_labels)
        test = features_of(model.backbone, images.test, images.test_labels)
        linear = linear_evaluation(train, test, self.budget.probe_epochs, seed=seed)
        result: Result = {
            "linear": dict(zip(map(str, LEARNING_RATES), linear, strict=True)),
            "linear_best": max(linear),
            "precision_at": {
                str(k): retrieval_precision(test.features, test.labels, k)
                for k in PRECISION_AT
                if k < len(test.labels)
            },
        }
        result |= common_scores(train, test, own_heads(model, test.features), images, seed)
        if not all(math.isfinite(value) for value in linear):
            raise DemoError("the features are not finite: the training diverged")
        result["scoring_seconds"] = time.perf_counter() - began
        return result

    def summary(self) -> dict[str, Any]:
        """Return what all tables of this folder share."""
        images = self.images()
        names = ("dataset", "formulas", "accelerator", "precision")
        shared = {name: getattr(self.args, name) for name in names}
        shared |= {"budget": asdict(self.budget), "seeds": self.seeds, "source": images.source}
        shared |= {"images": [len(images.train), len(images.test)], "pixels": images.fingerprint()}
        return json.loads(json.dumps(shared)) | {"image_size": images.size}
