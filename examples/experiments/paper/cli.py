"""The command line of the paper's experiments."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from experiments.options import exit_code, parser_of, quieten, settle
from experiments.paper import clusters, features, imagenet
from experiments.paper.budgets import BUDGETS
from experiments.paper.published import DATASETS
from experiments.paper.report import Report, publish
from experiments.paper.runs import Lab

EXPERIMENTS: dict[str, tuple[str, Callable[[Lab], Report]]] = {
    "table1": ("Table 1: SimCLR, MoCo, MoCo v2, BYOL and C2BIN", features.table1),
    "table2": ("Table 2: ImageNet, ResNet-50: the commands, and a small check", imagenet.table2),
    "table3": ("Tables 3 and 11: clusters", clusters.table3),
    "figure4": ("Figure 4: long-tailed classes", features.figure4),
    "figure5": ("Figure 5: features as training proceeds", clusters.figure5),
    "figure6": ("Figures 6 to 8: retrieval", clusters.figure6),
    "figure9": ("Figures 9 to 11: images by cluster", clusters.figure9),
    "table4": ("Tables 4 and 9: which heads", features.table4),
    "oracle": ("section 3: SimCLR without negatives of the same class", features.oracle),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake ends in argparse's message."""
    listed = "\n".join(f"  {name:8} {what}" for name, (what, _) in EXPERIMENTS.items())
    doc = (
        "Run one experiment of the C2BIN paper, or all of them. Runs are trained once and shared; "
        "Ctrl-C at any time, and the same command goes on."
    )
    parser: argparse.ArgumentParser = parser_of(
        doc,
        "runs/paper",
        "smoke digits, else cifar10",
        "processes that make views, budget full (default: cores - 1)",
        epilog=f"experiments:\n{listed}\n  all      every one of them",
    )
    parser.add_argument(
        "experiment", choices=[*EXPERIMENTS, "all"], metavar="EXPERIMENT", help="see below"
    )
    group = parser.add_argument_group("scale")
    add = group.add_argument
    add(
        "--budget",
        choices=BUDGETS,
        default="small",
        help="smoke: seconds, scores mean nothing; small: an hour of one core (default); full: the "
        "paper's settings, for a GPU",
    )
    add(
        "--seeds", type=int, nargs="+", metavar="SEED", help="default: smoke 0, small 0 1, full 0-4"
    )
    add("--epochs", type=int, metavar="N", help="of every run, in place of the budget's")
    add(
        "--formulas",
        choices=["default", "printed"],
        default="default",
        help="C2BINLoss's defaults, or the paper's formulas to the letter",
    )
    add(
        "--against",
        choices=DATASETS,
        default="cifar10",
        help="whose numbers stand beside those of images that the paper lacks (default: cifar10)",
    )
    add(
        "--solo",
        type=Path,
        metavar="FOLDER",
        help="table2: a checkout of solo-learn whose scripts to check",
    )
    add(
        "--solo-python",
        default=sys.executable,
        metavar="PYTHON",
        help="table2: the Python that solo-learn is installed for (default: this one)",
    )
    args = parser.parse_args(argv)

    budget = BUDGETS[args.budget]
    args.seeds = list(budget.seeds) if args.seeds is None else args.seeds
    settle(parser, args, budget.dataset, epochs=1)
    if args.solo and not (args.solo / "main_pretrain.py").is_file():
        parser.error(f"--solo: there is no {args.solo / 'main_pretrain.py'}")
    if args.workers is None:
        args.workers = max(1, min(16, (os.cpu_count() or 1) - 1))
    changes = {name: getattr(args, name) for name in ("limit", "limit_test", "epochs")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.epochs:
        part = args.epochs / budget.clustering_epochs
        shots = sorted({max(1, round(part * epoch)) for epoch in budget.snapshots})
        changes |= {"clustering_epochs": args.epochs, "snapshots": tuple(shots)}
    budget = replace(budget, **changes)
    args.scale, args.keep = budget, True
    if budget.stored_views and args.views == "made":
        args.views = "stored"
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    began = time.perf_counter()
    args = parse(argv)
    quieten()

    def run() -> None:
        lab = Lab(args, args.scale)
        names = list(EXPERIMENTS) if args.experiment == "all" else [args.experiment]
        for name in names:
            started = time.perf_counter()
            settings, lab.used = lab.summary(), {}
            lab.store.claim(name, settings, args.overwrite)
            outcome = EXPERIMENTS[name][1](lab)
            publish(lab, name, settings, outcome, time.perf_counter() - started)
        if len(names) > 1:
            print(f"all: {time.perf_counter() - began:.0f} s. Everything is in {lab.out}")

    return exit_code("paper.py", run, args.out)
