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
import os
import time
from typing import Any

import numpy as np
import torch

from c2bin_ext import C2BINLoss
from experiments.hardware import hardware, versions
from experiments.methods import FLOOR, LR_PER_IMAGE, METHODS, OPTIMIZATION, queue_size
from experiments.options import add_backbone, exit_code, first_process, parser_of, quieten, settle
from experiments.report import notes, table
from experiments.runs import Bench, Job, Trial, carry_out
from experiments.store import Result


def settings_of(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Return what decides all numbers of a table; methods and seeds can be added to an --out."""
    images = bench.images
    names = ("dataset", "backbone", "epochs", "batch_size", "num_clusters", "loss")
    shared = ("against", "normalize", "accelerator", "devices", "precision")
    settings = {name: getattr(args, name) for name in (*names, *shared)}
    settings |= {"source": images.source, "image_size": images.size}
    settings |= {"images": [len(images.train), len(images.test)], "pixels": images.fingerprint()}
    settings |= {"optimization": OPTIMIZATION | {"lr": LR_PER_IMAGE * args.batch_size}}
    settings |= {name: method.options for name, method in METHODS.items()}
    settings |= {"queue_size": queue_size(len(images.train))}
    # With all defaults: when they change, results are others.
    settings |= {"objective": " ".join(repr(C2BINLoss(**args.loss)).split())}
    return settings | {name: versions()[name] for name in ("torch", "lightly", "c2bin_ext")}


def jobs_of(args: argparse.Namespace, bench: Bench) -> list[Job]:
    """Return every run, those of the first seed first."""
    own = {"against": args.against, "normalize": args.normalize}
    c2bin = Trial("c2bin", {"num_clusters": args.num_clusters, **own}, args.loss)
    trials = [c2bin if name == "c2bin" else Trial(name) for name in (FLOOR, *args.methods)]
    # What the heads of C2BIN have to beat: as many clusters by k-means on BYOL's features.
    more = {"byol": {"kmeans": args.num_clusters}}
    return [
        job
        for seed in args.seeds
        for trial in trials
        for job in bench.jobs(trial, args.epochs, [seed], **more.get(trial.method, {}))
    ]


def report(
    args: argparse.Namespace, bench: Bench, jobs: list[Job], found: list[Result], record: Result
) -> str:
    """Write results.json, results.md and the pictures; return the table with its notes."""
    # Imported here: matplotlib takes a second that a mistyped argument need not wait for.
    from experiments import pictures

    images, out, n = bench.images, bench.store.out, 1 + len(args.methods)
    rows = {job.label: found[i::n] for i, job in enumerate(jobs[:n])}
    above = notes(images, args.backbone, args.epochs, args.batch_size, args.seeds)
    text = "\n\n".join([table(rows), *above])
    results = {
        job.settings["method"]: dict(zip(map(str, args.seeds), found[i::n], strict=True))
        for i, job in enumerate(jobs[:n])
    }
    first, labels = args.seeds[0], images.test_labels.numpy()
    arrays = {
        job.label: dict(np.load(bench.store.folder(job.name, job.settings) / "final.npz"))
        for job in jobs[:n]
    }
    features = {label: each["test"] for label, each in arrays.items()}
    curves = {job.label: result["curve"] for job, result in zip(jobs[1:n], found[1:n], strict=True)}
    drawn = ["curves.png", "tsne.png"]
    pictures.curves(out / "curves.png", curves)
    pictures.tsne(out / "tsne.png", features, labels, images.classes, first)
    if "c2bin" in args.methods:
        drawn.append("clusters.png")
        head = arrays["C2BIN"]["head0"]
        pictures.clusters(out / "clusters.png", images.test, labels, images.classes, head)
    shown = "\n\n".join(f"![{name}]({name})" for name in drawn)
    bench.store.publish("results", record | {"results": results}, f"{text}\n\n{shown}")
    return text


def compare(args: argparse.Namespace) -> None:
    """Train and score all methods; write the table and the pictures."""
    began = time.perf_counter()
    bench = Bench(args, args.epochs)
    images, settings = bench.images, settings_of(args, bench)
    if first_process():
        bench.store.claim("results", settings, args.overwrite)
        print(
            f"{images.source}: {len(images.train)} training images, {len(images.test)} test "
            f"images, {len(images.classes)} classes. Results: {args.out}"
        )
        print(*images.notes, sep="\n", flush=True)
    jobs = jobs_of(args, bench)
    found = carry_out(jobs, bench.store, args, "all")
    if not found:  # a further device's process
        return
    record = {
        "settings": settings,
        "seeds": args.seeds,
        "classes": images.classes,
        "notes": images.notes,
        "corrupt_files": len(images.corrupt),
        "corrupt": images.corrupt,
        "versions": versions(),
        "hardware": hardware(),
        "seconds_of_this_call": time.perf_counter() - began,
    }
    print(f"\n{report(args, bench, jobs, found, record)}\n")
    print(f"{time.perf_counter() - began:.0f} s. Table, numbers and pictures: {args.out}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake ends in argparse's message."""
    workers = "processes that make views, for each device"
    parser = parser_of(__doc__, "runs/demo", "digits", workers)
    add = parser.add_argument_group("training").add_argument
    add("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="default: all")
    add_backbone(add)
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
    add("--devices", type=int, default=1, help="above 1: distributed data parallel (default: 1)")
    add(
        "--smoke",
        action="store_true",
        help="only check that all works, in seconds: 320 images, 2 epochs; scores mean nothing",
    )
    parser.set_defaults(curves=True, keep=True)
    args: argparse.Namespace = parser.parse_args(argv)
    if args.smoke:
        args.limit, args.limit_test = args.limit or 320, args.limit_test or 100
    if args.epochs is None:
        args.epochs = 2 if args.smoke else 30
    settle(parser, args, "digits", epochs=1, batch_size=2, devices=1, num_clusters=2)
    try:
        args.loss = dict(map(option_of, args.loss))
        C2BINLoss(**args.loss)
    except (TypeError, ValueError) as error:
        parser.error(f"--loss: {error}")
    if args.batch_size % args.devices:
        parser.error(f"--batch-size {args.batch_size} is no multiple of --devices {args.devices}")
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


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    args = parse(argv)
    quieten()
    if args.accelerator == "cpu" and args.devices > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // args.devices))
    return exit_code("demo.py", lambda: compare(args), args.out)
