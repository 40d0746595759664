"""Trained runs: made once for each (method, settings, seed), kept, and read by every experiment."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import LightningModule

from c2bin_ext.metrics import retrieval_precision
from experiments.data import Images, limited, load
from experiments.evaluation import Features
from experiments.methods import KINDS, LR_PER_IMAGE, OPTIMIZATION, heads_by_class, queue_size
from experiments.paper.budgets import Budget
from experiments.paper.probe import LEARNING_RATES, linear_evaluation
from experiments.paper.subsets import thinned, with_superclasses
from experiments.runs import Job, carry_out, common_scores, settings_of
from experiments.store import Result, Store

PRECISION_AT = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Spec:
    """One row of an experiment, whatever the seed.

    Attributes:
        method: Key of `KINDS`.
        clusters: Of the method's heads.
        rate: Balance rate of the training images.
        clustering: The recipe of Table 10 in place of Table 5's.
        averaged: The cluster terms are the heads' mean in place of their sum.
    """

    method: str
    clusters: tuple[int, ...] = ()
    rate: float = 1.0
    clustering: bool = False
    averaged: bool = False

    @property
    def label(self) -> str:
        """Return the name for people."""
        rate = f", rate {self.rate:g}" if self.rate != 1 else ""
        return f"{KINDS[self.method].label} {self.heads}".rstrip() + rate

    @property
    def heads(self) -> str:
        """Return the set of clusters, as the paper writes it; nothing without heads."""
        listed = f"{{{', '.join(map(str, self.clusters))}}}" if self.clusters else ""
        return f"{listed}, averaged" if self.averaged else listed


def score(
    model: LightningModule, job: Job, folder: Path, train: Features, test: Features
) -> Result:
    """Return every score that any experiment reads, of the frozen features."""
    epochs, seed = job.settings["probe_epochs"], job.settings["seed"]
    linear = linear_evaluation(train, test, epochs, seed=seed)
    result: Result = {
        "linear": dict(zip(map(str, LEARNING_RATES), linear, strict=True)),
        "linear_best": max(linear),
        "precision_at": {
            str(k): retrieval_precision(test.features, test.labels, k)
            for k in PRECISION_AT
            if k < len(test.labels)
        },
    }
    return result | common_scores(model, job, train, test)


class Lab:
    """The images, the settings and the results folder of one command."""

    def __init__(self, args: argparse.Namespace, budget: Budget) -> None:
        self.args, self.budget, self.seeds = args, budget, list(args.seeds)
        limits = {"train": budget.limit, "test": budget.limit_test}
        whole = load(args, {})
        self._images = limited(whole, limits)
        self._superclasses = (
            limited(with_superclasses(whole), limits) if args.dataset == "cifar100" else None
        )
        self._subsets: dict[tuple[bool, float, int], tuple[Images, str]] = {}
        self.used: dict[str, dict[str, Any]] = {}  # settings of the runs of this experiment
        name = args.data.resolve().name if args.data else args.dataset
        self.store = Store(Path(args.out) / f"{name}-{budget.name}")
        self.out = self.store.out

    def subset(self, clustering: bool, rate: float, seed: int) -> tuple[Images, str]:
        """Return the images that a run is trained and scored on, and their fingerprint."""
        key = (clustering, rate, seed)
        if key not in self._subsets:
            base = self._superclasses if clustering and self._superclasses else self._images
            images = thinned(base, rate, seed)
            self._subsets[key] = images, images.fingerprint()
        return self._subsets[key]

    def images(self, clustering: bool = False, rate: float = 1.0, seed: int = 0) -> Images:
        """Return the images that a run is trained and scored on."""
        return self.subset(clustering, rate, seed)[0]

    def spec(self, method: str, clustering: bool = False) -> Spec:
        """Return the spec of a method with the heads of its paper."""
        classes = len(self.images(clustering).classes)
        heads = heads_by_class(method, classes)
        if method == "c2bin":
            heads = [classes, 40, 160] if clustering else [32, 64, 128]
        return Spec(method, tuple(heads), clustering=clustering)

    def job(self, spec: Spec, seed: int) -> Job:
        """Return the run of a spec with one seed."""
        images, pixels = self.subset(spec.clustering, spec.rate, seed)
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
        options: dict[str, Any] = dict(KINDS[spec.method].options)
        if spec.method in ("moco", "mocov2"):
            options["queue_size"] = queue_size(len(images.train))
        elif spec.method in ("byol", "c2bin"):  # the MLP(512, 512) of Tables 5 and 10
            momentum = 0.995 if spec.clustering else 0.99
            options = {"hidden_dim": 512, "projection_dim": 512, "follower_momentum": momentum}
        if spec.clusters:
            options["num_clusters"] = spec.clusters
        loss: dict[str, Any] = {}
        if spec.method == "c2bin":
            options |= {"against": "runner", "normalize": False}
            loss = {"cluster_weight": 2.0, "entropy_weight": 1.0, "temperature": 0.5}  # Table 5
            if spec.clustering:  # Table 10
                loss = {"cluster_weight": 1.0, "entropy_weight": 1.0, "temperature": 1.0}
            if spec.averaged:
                loss["cluster_weight"] /= len(spec.clusters)
            loss["formulas"] = self.args.formulas
        settings = settings_of(
            spec.method,
            rate | options,
            loss,
            self.args,
            images,
            seed=seed,
            epochs=budget.clustering_epochs if spec.clustering else budget.epochs,
            batch_size=batch,
            backbone=budget.clustering_backbone if spec.clustering else budget.backbone,
            pixels=pixels,
            source=images.source,
            recipe="Table 10" if spec.clustering else "Table 5",
            balance_rate=spec.rate,
            probe_epochs=budget.probe_epochs,
            snapshots=list(budget.snapshots) if spec.clustering else [],
        )
        parts = ["clustering" if spec.clustering else "features", spec.method]
        parts += [f"k{k}" for k in spec.clusters]
        parts += ["averaged"] if spec.averaged else []
        parts += [f"rate{spec.rate:g}"] if spec.rate > 1 else []
        return Job("-".join([*parts, f"seed{seed}"]), spec.label, images, settings)

    def results(self, specs: Sequence[Spec]) -> dict[Spec, list[Result]]:
        """Return the results of every spec, one per seed; train what is not there yet."""
        jobs = [self.job(spec, seed) for seed in self.seeds for spec in specs]
        self.used |= {self.store.folder(job.name, job.settings).name: job.settings for job in jobs}
        found = carry_out(jobs, self.store, self.args, "all", scored_by=score)
        return {spec: found[i :: len(specs)] for i, spec in enumerate(specs)}

    def arrays(self, spec: Spec, name: str = "final") -> dict[str, Any]:
        """Return the arrays of a spec's first seed."""
        job = self.job(spec, self.seeds[0])
        return dict(np.load(self.store.folder(job.name, job.settings) / f"{name}.npz"))

    def summary(self) -> dict[str, Any]:
        """Return what all tables of this folder share."""
        images = self.images()
        names = ("dataset", "formulas", "accelerator", "precision")
        shared = {name: getattr(self.args, name) for name in names}
        shared |= {"budget": asdict(self.budget), "seeds": self.seeds, "source": images.source}
        shared |= {"images": [len(images.train), len(images.test)], "pixels": images.fingerprint()}
        plain: dict[str, Any] = json.loads(json.dumps(shared))
        return plain | {"image_size": images.size}
