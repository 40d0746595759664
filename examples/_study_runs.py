"""Runs of a study: any method with any options, each kept by its settings, several side by side."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _demo_data import (
    Images,
    StoredViews,
    Views,
    load,
    stratified,
    view_transform,
)
from _demo_options import (
    add_images,
    add_machine,
    at_least,
    distinct_seeds,
    quieten,
    settle_images,
    settle_machine,
)
from _demo_report import hardware, mean_and_spread, versions
from _demo_training import BACKBONES, features_of, fit
from _study_variants import VARIATIONS, VariedC2BIN
from c2bin_explore.backbones import backbone
from demo import (
    LR_PER_IMAGE,
    METHODS,
    OPTIMIZATION,
    common_scores,
    own_heads,
    queue_size,
    write,
)
from experiments import evaluation as evaluate
from joblib import Parallel, delayed
from pytorch_lightning import LightningModule
from tqdm import tqdm

from c2bin_ext import C2BINLoss

Result = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One row of a study, whatever the seed: what differs from the demo's settings of a method.

    Attributes:
        method: Key of `demo.METHODS`.
        options: Of the method's class, `lr` for a batch of 128 among them.
        loss: Of `C2BINLoss`; of C2BIN alone.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)


def hush() -> None:
    """Silence Lightning, and what a table shows: too many clusters, features all alike."""
    quieten()
    warnings.filterwarnings("ignore", message="A head has .* clusters but a global batch")
    warnings.filterwarnings("ignore", message="Number of distinct clusters")


def objective(loss: dict[str, Any]) -> C2BINLoss:
    """Return C2BIN's loss: the default or, with `formulas`, the printed one, with options."""
    options = dict(loss)
    printed = options.pop("formulas", "") == "printed"
    return (C2BINLoss.paper if printed else C2BINLoss)(**options)


def settings_of(
    trial: Trial, args: argparse.Namespace, images: Images, pixels: str, epochs: int, seed: int
) -> dict[str, Any]:
    """Return all that decides a run's numbers; `pixels` is the images' fingerprint."""
    options: dict[str, Any] = {"lr": 128 * LR_PER_IMAGE, **OPTIMIZATION, **METHODS[trial.method][2]}
    if trial.method == "mocov2":
        options["queue_size"] = queue_size(len(images.train))
    if trial.method == "c2bin":
        options |= {"num_clusters": [32, 64, 128], "normalize": True, "against": "follower"}
    options |= trial.options
    options["lr"] *= args.batch_size / 128
    names = ("dataset", "backbone", "batch_size", "accelerator", "precision")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"method": trial.method, "options": options, "loss": trial.loss}
    if trial.method == "c2bin":
        # With all defaults: when they change, these are other runs.
        settings["objective"] = " ".join(repr(objective(trial.loss)).split())
    settings |= {"epochs": epochs, "seed": seed, "stored_views": args.workers == 0}
    settings |= {"images": [len(images.train), len(images.test)], "pixels": pixels}
    if args.curves:
        settings["curves"] = True
    return settings | {name: versions()[name] for name in ("torch", "lightly", "c2bin_ext")}


def model_of(settings: dict[str, Any], size: int) -> LightningModule:
    """Return an untrained model; with one seed, every method starts from the same backbone."""
    torch.manual_seed(settings["seed"])
    net, features = backbone(settings["backbone"], size)
    options = dict(settings["options"])
    _, kind, _ = METHODS[settings["method"]]
    if settings["method"] == "c2bin":
        options["loss"] = objective(settings["loss"])
        if not options.keys().isdisjoint(VARIATIONS):
            kind = VariedC2BIN
    model = kind(net, features, **options)
    # A quarter faster on a CPU, and what a GPU's half precision wants too.
    return model.to(memory_format=torch.channels_last)


def run(
    settings: dict[str, Any],
    args: argparse.Namespace,
    images: Images,
    folder: Path,
    views: Path | None,
) -> None:
    """Train from the last finished epoch, score and keep; the top level of a process of its own."""
    hush()
    if args.accelerator == "cpu" and args.processes > 1:
        torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "settings.json", json.dumps(settings, indent=1))
    model, seed = model_of(settings, images.size), settings["seed"]
    made = Views(images.train, images.train_labels, view_transform(images, args.dataset), seed)
    curve, _ = fit(
        model,
        METHODS[settings["method"]][0],
        images,
        folder / "last.ckpt",
        seed,
        tqdm(disable=True),
        dataset=args.dataset,
        epochs=settings["epochs"],
        batch_size=args.batch_size,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        workers=args.workers,
        views=None if views is None else StoredViews(views, made, settings["epochs"], images.size),
        scored=args.curves,
    )
    model.eval()
    train = features_of(model.backbone, images.train, images.train_labels)
    test = features_of(model.backbone, images.test, images.test_labels)
    result = common_scores(train, test, own_heads(model, test.features), images, seed)
    result |= {"seconds": sum(row["seconds"] for row in curve), "curve": curve}
    result["linear"] = evaluate.linear_probe(train, test, seed=seed).accuracy
    (folder / "last.ckpt").unlink(missing_ok=True)
    write(folder / "result.json", json.dumps(result, indent=1))


class Bench:
    """The images and the folder of one study, and its processes.

    Args:
        args: Of the command: those of `_demo_options`, and `limit`, `limit_test`, `validation`,
            `backbone`, `batch_size`, `processes` and `out`.
        longest: Epochs of the longest run: shorter ones share its views.
    """

    def __init__(self, args: argparse.Namespace, longest: int) -> None:
        self.args, self.longest = args, longest
        held = args.validation
        limits = {"train": args.limit and args.limit + held, "test": args.limit_test}
        loaded = load(
            args.data, args.dataset, args.data_root, args.image_size, args.skip_corrupt, limits
        )
        apart = torch.zeros(len(loaded.train), dtype=torch.bool)
        if held:
            apart[stratified(loaded.train_labels, held)] = True
        # Choices are made on images that are neither trained on nor reported on.
        self.images = replace(
            loaded, train=loaded.train[~apart], train_labels=loaded.train_labels[~apart]
        )
        self.validation = replace(
            self.images, test=loaded.train[apart], test_labels=loaded.train_labels[apart]
        )
        self.out = Path(args.out)

    def folder(self, settings: dict[str, Any]) -> Path:
        """Return where a run is kept: its method and a digest of its settings."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        name = f"{settings['method']}-{settings['epochs']}epochs-seed{settings['seed']}-{digest}"
        return self.out / "runs" / name

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
        images = self.images if final else self.validation
        pixels = images.fingerprint()
        plan = [
            [settings_of(trial, self.args, images, pixels, epochs, seed) for seed in seeds]
            for trial in trials
        ]
        # One trial may stand in several rows.
        missing = {
            self.folder(settings): settings
            for row in plan
            for settings in row
            if not (self.folder(settings) / "result.json").exists()
        }
        views = self.views(images, sorted({s["seed"] for s in missing.values()}))
        jobs = [
            delayed(run)(settings, self.args, images, folder, views.get(settings["seed"]))
            for folder, settings in missing.items()
        ]
        # Results come in any order: what matters is that each is on the disk.
        done = Parallel(n_jobs=self.args.processes, return_as="generator_unordered")(jobs)
        for _ in tqdm(done, desc=what, total=len(jobs), unit="run", disable=None):
            pass
        return [
            [json.loads((self.folder(s) / "result.json").read_text(encoding="utf-8")) for s in row]
            for row in plan
        ]

    def views(self, images: Images, seeds: Sequence[int]) -> dict[int, Path]:
        """Return where the stored views of each seed are; none with loader processes."""
        if self.args.workers:
            return {}
        folder = self.out / "views"
        folder.mkdir(parents=True, exist_ok=True)
        # Of the training images alone: validation and test images share them.
        digest = hashlib.sha256(images.train.numpy().data).hexdigest()[:16]
        paths = {seed: folder / f"{digest}-seed{seed}-{self.longest}epochs.npy" for seed in seeds}
        make = delayed(store)
        Parallel(n_jobs=self.args.processes)(
            make(path, images, self.args.dataset, self.longest, seed)
            for seed, path in paths.items()
        )
        return paths


def store(path: Path, images: Images, dataset: str, epochs: int, seed: int) -> None:
    """Make the views of one seed, if they are not there."""
    torch.set_num_threads(1)
    made = Views(images.train, images.train_labels, view_transform(images, dataset), seed)
    StoredViews(path, made, epochs, images.size)


def parser_of(doc: str, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every study takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_images(parser, default="digits")
    parser.add_argument("--data-name", help="what to call the images; default: the folder's name")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--limit", type=int, metavar="N", help="train on at most N images, stratified")
    add("--limit-test", type=int, metavar="N", help="test on at most N images, stratified")
    add("--backbone", choices=BACKBONES, default="small", help="default: small, for CPUs")
    add("--batch-size", type=int, default=128, help="default: 128")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED", help="default: 1 2 3")
    machine = add_machine(
        parser, "processes that make views for each run; default 0: made once, kept on the disk"
    )
    machine.add_argument(
        "--processes",
        type=int,
        default=1,
        help="runs side by side (default: 1); on CPUs, the cores",
    )
    parser.add_argument("--out", type=Path, default=Path(out), help=f"default: {out}")
    parser.set_defaults(validation=0, curves=False)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, **bounds: int) -> Any:
    """Return the checked arguments; a mistake ends in the parser's message."""
    args = parser.parse_args(argv)
    args.workers = args.workers or 0
    settle_images(parser, args)
    settle_machine(parser, args)
    distinct_seeds(parser, args)
    least = {"limit": 1, "limit_test": 1, "image_size": 8, "workers": 0, "processes": 1}
    at_least(parser, args, {**least, "batch_size": 2, **bounds})
    return args


COLUMNS = {
    "kNN k=200": ("knn200", 100, ".1f"),
    "kNN k=5": ("knn5", 100, ".1f"),
    "linear probe": ("linear", 100, ".1f"),
}
CLUSTERS = {"NMI": "nmi", "ACC": "acc"}


def cells(results: Sequence[Result]) -> list[str]:
    """Return a row of the tables: mean ± standard deviation over seeds of every score."""
    row = [
        mean_and_spread([scale * result[key] for result in results], form)
        for key, scale, form in COLUMNS.values()
    ]
    kmeans = [result["clustering"][0] for result in results]
    row += [mean_and_spread([scores[key] for scores in kmeans], ".3f") for key in CLUSTERS.values()]
    heads = [result["clustering"][1:] for result in results]
    if not heads[0]:
        return [*row, *[""] * len(CLUSTERS), ""]
    # Of heads of many sizes, the mean of their scores; and how much of each head is in use.
    row += [
        mean_and_spread([statistics.fmean(head[key] for head in each) for each in heads], ".3f")
        for key in CLUSTERS.values()
    ]
    used = [statistics.fmean(each[i]["in_use"] for each in heads) for i in range(len(heads[0]))]
    sizes = [head["k"] for head in heads[0]]
    return [*row, ", ".join(f"{u:.0f} of {k}" for u, k in zip(used, sizes, strict=True))]


HEAD = [
    *COLUMNS,
    *(f"{whose} {name}" for whose in ("k-means", "heads'") for name in CLUSTERS),
    "clusters in use",
]


def about(bench: Bench) -> dict[str, Any]:
    """Return what the numbers were made with; no path, so that they can be published."""
    args, images = bench.args, bench.images
    names = ("dataset", "limit", "limit_test", "validation", "backbone", "batch_size", "seeds")
    shared = {name: getattr(args, name) for name in (*names, "accelerator", "precision")}
    source = args.data_name or (args.data.resolve().name if args.data else args.dataset)
    counts = {"train": len(images.train), "test": len(images.test)}
    counts["validation"] = len(bench.validation.test)
    shared |= {"source": source, "images": counts, "image_size": images.size}
    return {"settings": shared, "versions": versions(), "hardware": hardware()}


SCORES = (
    "Accuracies in percent, of frozen features on these images; k-means with as many clusters as "
    "classes; the heads' NMI and ACC are means over heads. ACC matches clusters one to one with "
    "classes, so it falls as K grows."
)


def sentence(bench: Bench, scored: str = "test") -> str:
    """Return what the numbers of a table were made with; `scored` names the images of scores."""
    stated = about(bench)["settings"]
    counts, seeds = stated["images"], stated["seeds"]
    listed = ", ".join(map(str, seeds))
    over = f"seed {listed}" if len(seeds) == 1 else f"mean ± standard deviation of seeds {listed}"
    return (
        f"{stated['source']}: {counts['train']} training and {counts[scored]} {scored} images; "
        f"backbone {stated['backbone']}, batch {stated['batch_size']}, {over}."
    )


def recorded(results: Sequence[Result], seeds: Sequence[int]) -> dict[int, Result]:
    """Return each seed's scores, for the JSON file; the curves stay in the runs' folders."""
    return {
        seed: {name: value for name, value in result.items() if name != "curve"}
        for seed, result in zip(seeds, results, strict=True)
    }
