"""Train SimCLR, MoCo v2, BYOL and C2BIN alike, and compare them in one table.

All four get the same images, views, backbone, batches, epochs and seed.

  python examples/demo.py                                  scikit-learn's digits, no download
  python examples/demo.py --dataset cifar10 --epochs 50    a torchvision data set
  python examples/demo.py --data FOLDER                    FOLDER/{train,test}/<class>/<image>,
                                                           or FOLDER/<class>/<image>

Ctrl-C at any time: the same command goes on where it stopped and ends with the same numbers.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# OpenMP reads it when torch is loaded. Threads that spin while they wait would take the cores from
# the loader's workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from _demo_data import DemoError, Images, load
from _demo_options import (
    add_images,
    add_machine,
    at_least,
    distinct_seeds,
    quieten,
    settle_images,
    settle_machine,
)
from _demo_report import hardware, notes, table, versions
from _demo_training import BACKBONES, features_of, fit
from c2bin_explore.backbones import backbone
from c2bin_lightly import BYOL, C2BIN, MoCoV2, SimCLR
from experiments import evaluation as evaluate
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from tqdm import tqdm

from c2bin_ext import C2BINLoss
from c2bin_ext.metrics import effective_clusters

# What is not in these two tables is the same for all. From lightly's CIFAR-10 benchmark, untuned:
# the optimisation (SGD, 0.06 per 128 images), the sizes of projectors and predictors, the
# temperatures of SimCLR (0.5) and MoCo v2 (0.1), its symmetric loss and its queue (at most 4096),
# the followers' momentum (constant, as in C2BIN's paper). C2BIN is BYOL's line plus its adapter's
# defaults: the entropy weight 1 and the 32, 64 and 128 clusters of the paper's Table 5, and what
# won in examples/decisions.py, on these digits among others: the follower's clusters, the cluster
# weight 0.5 and the temperature 0.1.
OPTIMIZATION: dict[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "cosine",
}
LR_PER_IMAGE = 0.06 / 128
BOOTSTRAP = {"hidden_dim": 1024, "projection_dim": 256, "follower_momentum": 0.99}
CONTRAST = {"hidden_dim": 512, "projection_dim": 128}
METHODS: dict[str, tuple[str, type[LightningModule], dict[str, Any]]] = {
    "simclr": ("SimCLR", SimCLR, {**CONTRAST, "temperature": 0.5}),
    "mocov2": ("MoCo v2", MoCoV2, {**CONTRAST, "temperature": 0.1, "follower_momentum": 0.99}),
    "byol": ("BYOL", BYOL, BOOTSTRAP),
    "c2bin": ("C2BIN", C2BIN, BOOTSTRAP),
}
FLOOR = "untrained"
LABELS = {FLOOR: FLOOR} | {method: label for method, (label, _, _) in METHODS.items()}


@dataclass
class Run:
    """What all trainings of this command share."""

    args: argparse.Namespace
    images: Images
    first: bool

    def folder(self, method: str, seed: int) -> Path:
        """Return where a method's files go."""
        return Path(self.args.out) / f"seed{seed}" / method

    def finished(self, method: str, seed: int) -> bool:
        """Say whether a method's result is there."""
        return (self.folder(method, seed) / "result.json").exists()

    def model(self, method: str, seed: int) -> LightningModule:
        """Return an untrained model; with one seed, every method starts from the same backbone."""
        torch.manual_seed(seed)
        net, features = backbone(self.args.backbone, self.images.size)
        _, kind, options = METHODS[method]
        more: dict[str, Any] = {}
        if method == "mocov2":
            more["queue_size"] = queue_size(len(self.images.train))
        if method == "c2bin":
            more["num_clusters"] = tuple(self.args.num_clusters)
            more["loss"] = C2BINLoss(**{"gather_distributed": True, **self.args.loss})
            more["against"] = self.args.against
            more["normalize"] = self.args.normalize
        lr = LR_PER_IMAGE * self.args.batch_size
        return kind(net, features, lr=lr, **OPTIMIZATION, **options, **more)


def queue_size(images: int) -> int:
    """Return 4096, or half of a small set: a longer queue would be full of the query itself."""
    return min(4096, max(64, images // 2))


def scores_by(by: str, test: Tensor, clusters: Tensor, assignments: Tensor) -> dict[str, Any]:
    """Return how one way to cluster the test images fares against their labels (n,)."""
    scores = evaluate.clustering_scores(test, clusters)
    effective = effective_clusters(assignments.cpu())
    return {"by": by, "k": assignments.shape[1], **scores, "effective": effective}


def kmeans_scores(
    train: evaluate.Features, test: evaluate.Features, k: int, seed: int
) -> dict[str, Any]:
    """Return the scores of k-means, fitted on training features, on the test images."""
    k = min(k, len(train.labels))
    clusters = evaluate.kmeans(train, test, k=k, seed=seed)
    return scores_by("k-means", test.labels, clusters, nn.functional.one_hot(clusters, k).double())


def own_heads(model: LightningModule, features: Tensor) -> list[Tensor]:
    """Return what the heads of C2BIN make of features (n, d), a (n, K) each; none of others."""
    with torch.no_grad():
        return [*model.cluster_head(features)] if isinstance(model, C2BIN) else []


def common_scores(
    train: evaluate.Features,
    test: evaluate.Features,
    heads: list[Tensor],
    images: Images,
    seed: int,
) -> dict[str, Any]:
    """Return what every table here has: kNN, k-means, and the scores of C2BIN's own heads."""
    clustering = [kmeans_scores(train, test, len(images.classes), seed)]
    clustering += [scores_by("own head", test.labels, p.argmax(dim=1), p) for p in heads]
    return {
        "knn5": evaluate.knn_accuracy(train, test, k=5),
        "knn200": evaluate.knn_accuracy(train, test, k=200),
        "clustering": clustering,
    }


def assess(
    run: Run, method: str, model: LightningModule, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return every score of one model, and the arrays that the pictures need."""
    images, net = run.images, model.backbone
    assert isinstance(net, nn.Module)
    train = features_of(net, images.train, images.train_labels)
    test = features_of(net, images.test, images.test_labels)
    probe = evaluate.linear_probe(train, test, seed=seed)
    heads = own_heads(model, test.features)
    result = {"linear": probe.accuracy, "linear_lr": probe.lr}
    result |= common_scores(train, test, heads, images, seed)
    arrays = {"test": test.features.cpu().numpy()}
    arrays |= {f"head{i}": p.cpu().numpy() for i, p in enumerate(heads)}
    if method == "byol":
        # What the heads of C2BIN have to beat: as many clusters by k-means on BYOL's features.
        result["clustering"] += [kmeans_scores(train, test, k, seed) for k in run.args.num_clusters]
    return result, arrays


def run_method(run: Run, method: str, seed: int, overall: tqdm[Any]) -> None:
    """Train and score one method and keep its result, unless that is there already."""
    args, folder = run.args, run.folder(method, seed)
    if run.finished(method, seed):
        overall.update(0 if method == FLOOR else args.epochs)
        return
    curve: list[dict[str, float]] = []
    if method == FLOOR:
        if not run.first:
            return
        model = run.model("simclr", seed)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        model = run.model(method, seed)
        folder.mkdir(parents=True, exist_ok=True)
        names = ("dataset", "epochs", "batch_size", "accelerator", "devices", "precision")
        options = {name: getattr(args, name) for name in (*names, "workers")}
        checkpoint = folder / "last.ckpt"
        curve, evaluates = fit(
            model, LABELS[method], run.images, checkpoint, seed, overall, **options
        )
        if not evaluates:
            return
    began = time.perf_counter()
    result, arrays = assess(run, method, model, seed)
    result["evaluation_seconds"] = time.perf_counter() - began
    took = ""
    if curve:
        seconds = [row["seconds"] for row in curve]
        result["seconds_per_epoch"] = statistics.median(seconds)
        result["training_seconds"] = sum(seconds)
        result["curve"] = curve
        took = f"; {sum(seconds):.0f} s of training"
    np.savez_compressed(folder / "arrays.npz", **arrays)
    write(folder / "result.json", json.dumps(result, indent=1))
    tqdm.write(
        f"{LABELS[method]}, seed {seed}: linear probe {100 * result['linear']:.1f} %, "
        f"kNN (k = 5) {100 * result['knn5']:.1f} %{took}"
    )


def write(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def report(run: Run, settings: dict[str, Any], began: float) -> str:
    """Write results.json, results.md and the pictures; return the table with its notes."""
    # Imported here: matplotlib takes a second that a mistyped argument need not wait for.
    import _demo_pictures as pictures

    args, images, out = run.args, run.images, Path(run.args.out)
    methods = [FLOOR, *args.methods]
    results = {
        method: [
            json.loads((run.folder(method, seed) / "result.json").read_text(encoding="utf-8"))
            for seed in args.seeds
        ]
        for method in methods
    }
    above = notes(images, args.backbone, args.epochs, args.batch_size, args.seeds)
    text = table({LABELS[method]: runs for method, runs in results.items()})
    text = "\n\n".join([text, *above])
    everything = {
        "settings": settings,
        "seeds": args.seeds,
        "classes": images.classes,
        "notes": images.notes,
        "corrupt_files": len(images.corrupt),
        "corrupt": images.corrupt,
        "versions": versions(),
        "hardware": hardware(),
        "seconds_of_this_call": time.perf_counter() - began,
        "results": {
            method: {str(seed): result for seed, result in zip(args.seeds, runs, strict=True)}
            for method, runs in results.items()
        },
    }
    write(out / "results.json", json.dumps(everything, indent=1))

    seed, labels = args.seeds[0], images.test_labels.numpy()
    arrays = {m: dict(np.load(run.folder(m, seed) / "arrays.npz")) for m in methods}
    features = {LABELS[m]: arrays[m]["test"] for m in methods}
    drawn = ["curves.png", "tsne.png"]
    pictures.curves(out / "curves.png", {LABELS[m]: results[m][0]["curve"] for m in args.methods})
    pictures.tsne(out / "tsne.png", features, labels, images.classes, seed)
    if "c2bin" in args.methods:
        drawn.append("clusters.png")
        head = arrays["c2bin"]["head0"]
        pictures.clusters(out / "clusters.png", images.test, labels, images.classes, head)
    shown = "\n\n".join(f"![{name}]({name})" for name in drawn)
    write(out / "results.md", f"{text}\n\n{shown}\n")
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake ends in argparse's message."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_images(parser, default="digits")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--limit", type=int, metavar="N", help="use at most N training images, stratified")
    add("--limit-test", type=int, metavar="N", help="use at most N test images, stratified")
    add("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="default: all")
    add("--backbone", choices=BACKBONES, default="small", help="default: small, for CPUs")
    add("--epochs", type=int, help="default: 30")
    add("--batch-size", type=int, default=128, help="of all devices together (default: 128)")
    add(
        "--num-clusters",
        type=int,
        nargs="+",
        metavar="K",
        default=[32, 64, 128],
        help="of C2BIN's heads (default: 32 64 128)",
    )
    add(
        "--loss",
        nargs="+",
        metavar="OPTION=VALUE",
        default=[],
        help="options of C2BINLoss, such as similarity=dot symmetric=False",
    )
    add(
        "--against",
        choices=["runner", "follower"],
        default="follower",
        help="whose clusters C2BIN's are contrasted with (default: follower; the paper's: runner)",
    )
    add(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="L2-normalised features for C2BIN's heads (default: yes; the paper's: no)",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        default=[0],
        help="several give mean ± standard deviation (default: 0)",
    )
    machine = add_machine(parser, workers="processes that make views, for each device")
    machine.add_argument(
        "--devices", type=int, default=1, help="above 1: distributed data parallel (default: 1)"
    )
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    add("--overwrite", action="store_true", help="discard what other settings left in --out")
    add(
        "--smoke",
        action="store_true",
        help="only check that all works, in seconds: 320 images, 2 epochs; scores mean nothing",
    )
    args = parser.parse_args(argv)

    settle_images(parser, args)
    if args.smoke:
        args.limit, args.limit_test = args.limit or 320, args.limit_test or 100
    if args.epochs is None:
        args.epochs = 2 if args.smoke else 30
    least = {"epochs": 1, "batch_size": 2, "devices": 1, "image_size": 8, "workers": 0}
    at_least(parser, args, {**least, "limit": 1, "limit_test": 1, "num_clusters": 2})
    try:
        args.loss = dict(map(option_of, args.loss))
        C2BINLoss(**args.loss)
    except (TypeError, ValueError) as error:
        parser.error(f"--loss: {error}")
    distinct_seeds(parser, args)
    if args.batch_size % args.devices:
        parser.error(f"--batch-size {args.batch_size} is no multiple of --devices {args.devices}")
    settle_machine(parser, args, args.devices)
    args.methods = [method for method in METHODS if method in args.methods]
    if args.workers is None:
        cores = (os.cpu_count() or 1) // args.devices
        spare = cores - 1 if args.accelerator == "gpu" else cores // 2
        args.workers = min(8, max(0 if args.devices > 1 else 1, spare))
    return args


def option_of(text: str) -> tuple[str, Any]:
    """Return name and value of OPTION=VALUE; what is no number or bool stays a string."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"expected OPTION=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def settings_of(args: argparse.Namespace, images: Images) -> dict[str, Any]:
    """Return all that decides a method's numbers; methods and seeds can be added to an --out."""
    names = ("dataset", "backbone", "epochs", "batch_size", "num_clusters", "loss")
    shared = ("against", "normalize", "accelerator", "devices", "precision")
    settings = {name: getattr(args, name) for name in (*names, *shared)}
    settings |= {"source": images.source, "image_size": images.size}
    settings |= {"images": [len(images.train), len(images.test)], "pixels": images.fingerprint()}
    settings |= {"optimization": OPTIMIZATION | {"lr": LR_PER_IMAGE * args.batch_size}}
    settings |= {method: options for method, (_, _, options) in METHODS.items()}
    settings |= {"queue_size": queue_size(len(images.train))}
    # With all defaults: when they change, results are others.
    settings |= {"objective": " ".join(repr(C2BINLoss(**args.loss)).split())}
    return settings | {name: versions()[name] for name in ("torch", "lightly", "c2bin_ext")}


def claim(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make `out` ours; refuse other settings' results, and a folder that is somebody else's."""
    stored = out / "settings.json"
    if out.exists() and not out.is_dir():
        raise DemoError(f"--out {out} is a file")
    if stored.exists():
        before = json.loads(stored.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(settings))
        changed = [
            f"{name} was {before.get(name)}, is {now.get(name)}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if not changed:
            return
        if not overwrite:
            raise DemoError(
                f"{out} holds results of other settings ({'; '.join(changed)}): "
                "choose another --out, or discard them with --overwrite"
            )
        for folder in out.glob("seed*"):
            shutil.rmtree(folder)
        for name in ("results.json", "results.md", "curves.png", "tsne.png", "clusters.png"):
            (out / name).unlink(missing_ok=True)
    elif out.exists() and any(out.iterdir()):
        raise DemoError(f"--out {out} is not empty and not of this demo: choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(stored, json.dumps(settings, indent=1))
    except OSError as error:
        raise DemoError(f"cannot write to --out {out}: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    began = time.perf_counter()
    args = parse(argv)
    quieten()
    # Each further device's process runs this script from the top; only the first writes and speaks.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    run: Run | None = None
    try:
        images = load(
            args.data,
            args.dataset,
            args.data_root,
            args.image_size,
            args.skip_corrupt,
            {"train": args.limit, "test": args.limit_test},
        )
        if len(images.train) < args.batch_size:
            raise DemoError(
                f"{len(images.train)} training images are fewer than one batch of "
                f"{args.batch_size}: use a smaller --batch-size or more images"
            )
        settings = settings_of(args, images)
        run = Run(args, images, first)
        if first:
            claim(args.out, settings, args.overwrite)
            print(
                f"{images.source}: {len(images.train)} training images, {len(images.test)} test "
                f"images, {len(images.classes)} classes. Results: {args.out}"
            )
            print(*images.notes, sep="\n", flush=True)
        if args.accelerator == "cpu" and args.devices > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // args.devices))
        epochs = args.epochs * len(args.methods) * len(args.seeds)
        hidden = None if first else True  # None: hidden where there is no terminal
        with tqdm(total=epochs, desc="all", unit="epoch", position=0, disable=hidden) as overall:
            for seed in args.seeds:
                for method in (FLOOR, *args.methods):
                    run_method(run, method, seed, overall)
        if first:
            print(f"\n{report(run, settings, began)}\n")
            print(f"{time.perf_counter() - began:.0f} s. Table, numbers and pictures: {args.out}")
    except DemoError as error:
        if first:
            print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            pairs = [(m, s) for s in args.seeds for m in args.methods]
            done = [f"{LABELS[m]} (seed {s})" for m, s in pairs if run and run.finished(m, s)]
            print(
                f"\nInterrupted. Finished and kept in {args.out}: "
                f"{', '.join(done) or 'nothing yet'}. The same command goes on from there, in the "
                "unfinished method after its last whole epoch.",
                file=sys.stderr,
            )
        return 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
