"""Runs: any method with any settings, each kept by its settings, one by one or side by side."""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from c2bin_lightly import C2BIN
from joblib import Parallel, delayed
from pytorch_lightning import LightningModule
from tqdm import tqdm

from experiments.data import Images, load, stratified
from experiments.evaluation import Features, cluster_scores, kmeans, lightly_knn, linear_probe
from experiments.hardware import hardware, versions
from experiments.methods import (
    FLOOR,
    KINDS,
    LR_PER_IMAGE,
    OPTIMIZATION,
    heads_by_class,
    model_of,
    objective,
    queue_size,
)
from experiments.options import add_backbone, first_process, parser_of, quieten, settle
from experiments.store import ExperimentError, Result, Store
from experiments.training import features_of, fit, own_heads, save_arrays
from experiments.views import StoredViews, Views

Settings = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A method and what differs from the settings that it has in `METHODS`, whatever the seed.

    Attributes:
        method: Key of `KINDS`.
        options: Of the method's class, `lr` for a batch of 128 among them.
        loss: Of `C2BINLoss`, for C2BIN only.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A run: its name in the store and for people, its images, all that decides its numbers."""

    name: str
    label: str
    images: Images
    settings: Settings


def kmeans_scores(train: Features, test: Features, k: int, seed: int) -> Result:
    """Return the scores of k-means, fitted on training features, on the test images."""
    k = min(k, len(train.labels))
    clusters = kmeans(train, test, k=k, seed=seed)
    return {"by": "k-means", "k": k, **cluster_scores(test.labels, clusters)}


def common_scores(model: LightningModule, job: Job, train: Features, test: Features) -> Result:
    """Return what every table has: kNN, k-means, and the scores of the method's own heads."""
    sizes = [len(job.images.classes), *job.settings.get("kmeans", ())]
    found = [kmeans_scores(train, test, k, job.settings["seed"]) for k in sizes]
    heads = [
        {"by": "own head", "k": p.shape[1], **cluster_scores(test.labels, p)}
        for p in own_heads(model, test.features)
    ]
    return {
        "knn5": lightly_knn(train, test, k=5),
        "knn200": lightly_knn(train, test, k=200),
        "clustering": [found[0], *heads, *found[1:]],
    }


def score(
    model: LightningModule, job: Job, folder: Path, train: Features, test: Features
) -> Result:
    """Return the common scores and lightly's linear probe."""
    probe = linear_probe(train, test, seed=job.settings["seed"])
    linear = {"linear": probe.accuracy, "linear_lr": probe.lr}
    return linear | common_scores(model, job, train, test)


Score = Callable[[LightningModule, Job, Path, Features, Features], Result]


def perform(
    job: Job,
    args: argparse.Namespace,
    overall: tqdm[Any] | None,
    views: tuple[Path, int] | None,
    scored_by: Score,
    folder: Path,
) -> Result | None:
    """Train from the last finished epoch and score; None where another process does."""
    images, settings = job.images, job.settings
    model, curve, evaluates = model_of(settings), list[dict[str, float]](), first_process()
    if settings["epochs"]:
        curve, evaluates = fit(
            model,
            job.label,
            images,
            folder,
            settings,
            args,
            tqdm(disable=True) if overall is None else overall,
            views=views and stored(job, *views),
            scored=settings["curves"],
        )
    if not evaluates:
        return None
    began = time.perf_counter()
    model.eval()
    backbone = model.get_submodule("backbone")
    train = features_of(backbone, images.train, images.train_labels)
    test = features_of(backbone, images.test, images.test_labels)
    if not all(bool(part.features.isfinite().all()) for part in (train, test)):
        raise ExperimentError(f"{job.label}: the features are not finite, the training diverged")
    result = scored_by(model, job, folder, train, test)
    seconds = [row["seconds"] for row in curve]
    result |= {"training_seconds": sum(seconds), "curve": curve}
    if seconds:
        result["seconds_per_epoch"] = statistics.median(seconds)
    result["evaluation_seconds"] = time.perf_counter() - began
    if args.keep:
        save_arrays(folder / "final.npz", model, test)
    if overall is not None:
        tqdm.write(
            f"{job.label}, seed {settings['seed']}: kNN (k = 5) {100 * result['knn5']:.1f} %, "
            f"{sum(seconds):.0f} s of training"
        )
    return result


def make(
    job: Job,
    store: Store,
    args: argparse.Namespace,
    overall: tqdm[Any] | None,
    views: tuple[Path, int] | None,
    scored_by: Score,
) -> None:
    """Make one run and keep it; without the bar `overall`, in a process of its own."""
    if overall is None:
        quieten(tables=True)
        if args.accelerator == "cpu":
            torch.set_num_threads(1)
    store.run(job.name, job.settings, partial(perform, job, args, overall, views, scored_by))
    if not args.keep:
        (store.folder(job.name, job.settings) / "last.ckpt").unlink(missing_ok=True)


def carry_out(
    jobs: Sequence[Job],
    store: Store,
    args: argparse.Namespace,
    what: str,
    *,
    longest: int = 0,
    scored_by: Score = score,
) -> list[Result]:
    """Return the results of jobs, in their order; train what is not there yet.

    Args:
        jobs: What to run.
        store: Where results are kept.
        args: The machine: see `fit`; `processes` jobs run side by side; `keep` checkpoints and
            test features.
        what: The name on the bar.
        longest: Epochs of the stored views, for shorter runs to share them.
        scored_by: Gives the scores of a trained model.
    """
    # One job may stand in several rows.
    missing = {
        store.folder(job.name, job.settings): job
        for job in jobs
        if store.result(job.name, job.settings) is None
    }
    have = sum(store.result(job.name, job.settings) is not None for job in jobs)
    if have and first_process():
        tqdm.write(f"{have} of {len(jobs)} runs are there already")
    todo = list(missing.values())
    views = stored_views(todo, store, args.processes, longest)
    if args.processes > 1:
        task = delayed(make)
        plan = [task(job, store, args, None, views.get(id(job)), scored_by) for job in todo]
        # Results come in any order: what matters is that each is on the disk.
        done = Parallel(n_jobs=args.processes, return_as="generator_unordered")(plan)
        for _ in tqdm(done, desc=what, total=len(todo), unit="run", disable=None):
            pass
    else:
        epochs = sum(job.settings["epochs"] for job in todo)
        hidden = None if first_process() else True  # None: hidden where there is no terminal
        with tqdm(total=epochs, desc=what, unit="epoch", position=0, disable=hidden) as overall:
            for job in todo:
                make(job, store, args, overall, views.get(id(job)), scored_by)
    if not first_process():
        return []
    return [store.result(job.name, job.settings) or {} for job in jobs]


def stored_views(
    jobs: Sequence[Job], store: Store, processes: int, longest: int
) -> dict[int, tuple[Path, int]]:
    """Make the views that jobs store; return for each job its file, and the epochs in it."""
    found: dict[int, tuple[Path, int]] = {}
    first: dict[str, Job] = {}
    for job in jobs:
        settings = job.settings
        if settings["views"] == "stored" and settings["epochs"]:
            epochs = longest or settings["epochs"]
            # Of the training images alone: validation and test images share them.
            pixels = hashlib.sha256(job.images.train.numpy().data).hexdigest()[:16]
            name = f"{pixels}-{settings['dataset']}-seed{settings['seed']}-{epochs}epochs.npy"
            found[id(job)] = store.out / "views" / name, epochs
            first.setdefault(name, job)
    if first:
        (store.out / "views").mkdir(exist_ok=True)
    task = delayed(store_views)
    Parallel(n_jobs=processes)(task(job, *found[id(job)]) for job in first.values())
    return found


def stored(job: Job, path: Path, epochs: int) -> StoredViews:
    """Return the views of one seed; make them if they are not there."""
    settings = job.settings
    return StoredViews(path, Views(job.images, settings["dataset"], settings["seed"]), epochs)


def store_views(job: Job, path: Path, epochs: int) -> None:
    """Make the views of one seed, if they are not there; in a process that returns nothing."""
    stored(job, path, epochs)


def settings_of(
    method: str,
    options: dict[str, Any],
    loss: dict[str, Any],
    args: argparse.Namespace,
    images: Images,
    **more: Any,
) -> Settings:
    """Return all that decides a run's numbers.

    Args:
        method: Key of `KINDS`.
        options: Of its class, the optimisation among them.
        loss: Of `C2BINLoss`, see `objective`.
        args: Of the command.
        images: Trained and scored on.
        **more: `epochs`, `seed`, `backbone`, `batch_size`, `pixels` (the images' fingerprint), and
            what else matters.
    """
    settings: Settings = {"method": method, "options": options, "loss": loss}
    names = ("dataset", "accelerator", "devices", "precision", "views", "channels_last")
    settings |= {name: getattr(args, name) for name in (*names, "curves")}
    settings |= {"images": [len(images.train), len(images.test)], "image_size": images.size}
    if issubclass(KINDS[method].kind, C2BIN):
        # With all defaults: when they change, these are other runs.
        settings["objective"] = " ".join(repr(objective(loss)).split())
    settings |= {name: versions()[name] for name in ("torch", "lightly", "c2bin_ext")} | more
    return settings | ({"epochs": 0} if method == FLOOR else {})


class Bench:
    """The images and the folder of one command.

    Args:
        args: Of the command: those of `options.add_images` and `add_machine`, and `limit`,
            `limit_test`, `validation`, `backbone`, `batch_size` and `out`.
        longest: Epochs of the longest run: shorter ones share its stored views.
    """

    def __init__(self, args: argparse.Namespace, longest: int) -> None:
        self.args, self.longest = args, longest
        held = args.validation
        limits = {"train": args.limit and args.limit + held, "test": args.limit_test}
        loaded = load(args, limits)
        if 0 < held < len(loaded.classes):
            raise ExperimentError(
                f"--validation {held}: expected at least {len(loaded.classes)}, one a class"
            )
        left = len(loaded.train) - held
        if left < args.batch_size:
            beside = f", {max(left, 0)} beside --validation {held}," if held else ""
            raise ExperimentError(
                f"{len(loaded.train)} training images{beside} are fewer than one batch of "
                f"{args.batch_size}: use a smaller --batch-size or more images"
            )
        chosen = torch.zeros(len(loaded.train), dtype=torch.bool)
        if held:
            chosen[stratified(loaded.train_labels, held)] = True
        # Choices are made on images that are neither trained on nor reported on.
        self.images = replace(
            loaded, train=loaded.train[~chosen], train_labels=loaded.train_labels[~chosen]
        )
        self.validation = replace(
            self.images, test=loaded.train[chosen], test_labels=loaded.train_labels[chosen]
        )
        self.store = Store(Path(args.out))

    def jobs(
        self, trial: Trial, epochs: int, seeds: Sequence[int], final: bool = True, **more: Any
    ) -> list[Job]:
        """Return the runs of a trial, one a seed."""
        images = self.images if final else self.validation
        method, label = trial.method, KINDS[trial.method].label
        options: dict[str, Any] = {"lr": 128 * LR_PER_IMAGE, **OPTIMIZATION}
        options |= KINDS[method].options
        if method == "mocov2":
            options["queue_size"] = queue_size(len(images.train))
        if issubclass(KINDS[method].kind, C2BIN):
            options |= {"num_clusters": [32, 64, 128], "normalize": True, "against": "follower"}
        elif heads := heads_by_class(method, len(images.classes)):
            options["num_clusters"] = heads
        options |= trial.options
        options["lr"] *= self.args.batch_size / 128
        more |= {name: getattr(self.args, name) for name in ("backbone", "batch_size")}
        more |= {"pixels": images.fingerprint(), "epochs": epochs}
        return [
            Job(
                f"{method}-{epochs}epochs-seed{seed}",
                label,
                images,
                settings_of(method, options, trial.loss, self.args, images, seed=seed, **more),
            )
            for seed in seeds
        ]

    def results(
        self, what: str, trials: Sequence[Trial], epochs: int, seeds: Sequence[int], final: bool
    ) -> list[list[Result]]:
        """Return for each trial its results, one a seed; train what is not there yet.

        Args:
            what: The name on the bar.
            trials: What to run.
            epochs: Of each.
            seeds: Each trial is run with each.
            final: Score on the test images, and not on the validation images.
        """
        plan = [job for trial in trials for job in self.jobs(trial, epochs, seeds, final)]
        found = carry_out(plan, self.store, self.args, what, longest=self.longest)
        n = len(seeds)
        return [found[i * n : (i + 1) * n] for i in range(len(trials))]

    def about(self) -> dict[str, Any]:
        """Return what the numbers were made with; no path, so that they can be published."""
        args, images = self.args, self.images
        names = ("dataset", "limit", "limit_test", "validation", "backbone", "batch_size", "seeds")
        shared = {name: getattr(args, name) for name in (*names, "accelerator", "precision")}
        if args.views == "tensors":  # other random draws than torchvision's
            shared["views"] = args.views
        source = args.data_name or (args.data.resolve().name if args.data else args.dataset)
        counts = {"train": len(images.train), "test": len(images.test)}
        counts["validation"] = len(self.validation.test)
        shared |= {"source": source, "images": counts, "image_size": images.size}
        return {"settings": shared, "versions": versions(), "hardware": hardware()}


def study_parser(doc: str, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every study takes."""
    workers = "processes that make views for each run; default 0: made once, kept on the disk"
    parser: argparse.ArgumentParser = parser_of(doc, out, "digits", workers)
    add = parser.add_argument_group("training").add_argument
    add("--data-name", help="what to call the images; default: the folder's name")
    add_backbone(add)
    add("--batch-size", type=int, default=128, help="default: 128")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED", help="default: 1 2 3")
    add(
        "--processes",
        type=int,
        default=1,
        help="runs side by side (default: 1); on CPUs, the cores",
    )
    return parser


def parse_study(parser: argparse.ArgumentParser, argv: list[str] | None, **bounds: int) -> Any:
    """Return the checked arguments; a mistake ends in the parser's message."""
    args = parser.parse_args(argv)
    args.workers = args.workers or 0
    settle(parser, args, "digits", processes=1, batch_size=2, **bounds)
    if args.views == "made" and not args.workers:
        args.views = "stored"
    args.channels_last = True
    quieten(tables=True)
    return args
