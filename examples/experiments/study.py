"""Tune C2BIN and its baselines with one budget, then compare them on seeds of their own.

    python examples/study.py --data FOLDER --limit 5000 --processes 2

Successive halving: every method gets as many settings, drawn at random from its own space (the
first is the demo's), and as many epochs. The best third of each rung goes on to the next, chosen by
kNN (k = 200) on validation images that are neither trained on nor tested on. Then each method's
winner, and its settings before tuning, are trained with fresh seeds and scored on the test images.

Writes NAME.md and NAME.json to --out. Ctrl-C at any time: the same command goes on.
"""

from __future__ import annotations

import math
import random
from typing import Any

from experiments.methods import METHODS
from experiments.options import exit_code
from experiments.report import HEAD, SCORES, cells, markdown, recorded, sentence
from experiments.runs import Bench, Trial, parse_study, study_parser

# What a rung keeps.
KEEP = 3
SHARED: dict[str, list[Any]] = {
    "lr": [0.015, 0.03, 0.06, 0.12, 0.24],
    "weight_decay": [1e-4, 5e-4],
}
FOLLOWER: dict[str, list[Any]] = {
    "follower_momentum": [0.97, 0.99, 0.996],
    "follower_schedule": ["constant", "cosine"],
}
SPACES: dict[str, dict[str, list[Any]]] = {
    "simclr": {**SHARED, "temperature": [0.1, 0.2, 0.5], "hidden_dim": [512, 1024]},
    "mocov2": {
        **SHARED,
        **FOLLOWER,
        "temperature": [0.07, 0.1, 0.2],
        "queue_size": [512, 1024, 2048],
    },
    "byol": {**SHARED, **FOLLOWER, "hidden_dim": [512, 1024]},
    "c2bin": {
        **SHARED,
        **FOLLOWER,
        "hidden_dim": [512, 1024],
        "num_clusters": [[10, 20, 40], [32, 64, 128], [64, 128, 256]],
        "against": ["runner", "follower"],
        "normalize": [False, True],
    },
}
LOSS: dict[str, list[Any]] = {
    "cluster_weight": [0.1, 0.2, 0.5, 1.0, 2.0],
    "entropy_weight": [0.5, 1.0, 2.0],
    "temperature": [0.05, 0.1, 0.2, 0.5],
}

# What won on 5,000 images of CIFAR-10 in 12 epochs: docs/results/study.md. C2BIN: the default.
TUNED = {
    "simclr": Trial(
        "simclr", {"lr": 0.015, "weight_decay": 5e-4, "temperature": 0.1, "hidden_dim": 512}
    ),
    "mocov2": Trial(
        "mocov2",
        {
            "lr": 0.015,
            "weight_decay": 5e-4,
            "follower_momentum": 0.99,
            "follower_schedule": "constant",
            "temperature": 0.2,
            "queue_size": 1024,
        },
    ),
    "byol": Trial(
        "byol",
        {
            "lr": 0.12,
            "weight_decay": 5e-4,
            "follower_momentum": 0.996,
            "follower_schedule": "cosine",
            "hidden_dim": 1024,
        },
    ),
    "c2bin": Trial("c2bin"),
}


def settings_in(method: str) -> int:
    """Return how many settings of a method there are, the demo's among them."""
    spaces = [SPACES[method], LOSS if method == "c2bin" else {}]
    return 1 + math.prod(len(values) for space in spaces for values in space.values())


def draw(method: str, count: int) -> list[Trial]:
    """Return the settings to try: the demo's, then random ones, always alike."""
    source = random.Random(f"study of {method}")
    trials = [Trial(method)]
    while len(trials) < count:
        options = {name: source.choice(values) for name, values in SPACES[method].items()}
        loss = {name: source.choice(values) for name, values in LOSS.items()}
        trial = Trial(method, options, loss if method == "c2bin" else {})
        if trial not in trials:
            trials.append(trial)
    return trials


def tune(bench: Bench, methods: list[str], count: int, rungs: list[int]) -> list[dict[str, Any]]:
    """Return every rung: its epochs, and per method its trials with their scores, best first."""
    left = {method: draw(method, count) for method in methods}
    history = []
    for epochs in rungs:
        trials = [trial for method in methods for trial in left[method]]
        name = f"{epochs} epochs, {len(trials)} settings"
        results = bench.results(name, trials, epochs, [0], final=False)
        scored = list(zip(trials, [row[0]["knn200"] for row in results], strict=True))
        ranked = {
            method: sorted((row for row in scored if row[0].method == method), key=lambda r: -r[1])
            for method in methods
        }
        history.append({"epochs": epochs, "ranked": ranked})
        left = {
            method: [trial for trial, _ in rows[: max(1, len(rows) // KEEP)]]
            for method, rows in ranked.items()
        }
    return history


def study(args: Any) -> None:
    """Tune, compare the winners, write the tables."""
    bench = Bench(args, max(*args.rungs, args.epochs))
    record = bench.about()
    record["settings"] |= {"trials": args.trials, "rungs": args.rungs, "epochs": args.epochs}
    bench.store.claim(args.name, record["settings"], args.overwrite)
    history = tune(bench, args.methods, args.trials, args.rungs)
    rows: dict[str, Trial] = {}
    for method in args.methods:
        label, (best, _) = METHODS[method].label, history[-1]["ranked"][method][0]
        rows[f"{label}, tuned"] = best
        rows[f"{label}, as in the demo"] = Trial(method)
    final = bench.results("winners", list(rows.values()), args.epochs, args.seeds, final=True)
    found = dict(zip(rows, final, strict=True))
    table = [[name, *cells(results)] for name, results in found.items()]
    spent = sum(rung["epochs"] * len(rung["ranked"][args.methods[0]]) for rung in history)
    chosen = [
        f"- {METHODS[method].label}: {described(history[-1]['ranked'][method][0][0])}"
        for method in args.methods
    ]
    rungs = ", ".join(
        f"{len(rung['ranked'][args.methods[0]])} for {rung['epochs']} epochs" for rung in history
    )
    text = "\n\n".join(
        [
            markdown(["method", *HEAD], table),
            f"{sentence(record['settings'])} {args.epochs} epochs. {SCORES} Each "
            f"method was tuned for {spent} epochs (settings: {rungs}) by kNN on "
            f"{len(bench.validation.test)} other images.",
            "What won:",
            "\n".join(chosen),
        ]
    )
    record["rungs"] = [
        {
            "epochs": rung["epochs"],
            "validation_knn200": [
                {**vars(trial), "score": score}
                for ranked in rung["ranked"].values()
                for trial, score in ranked
            ],
        }
        for rung in history
    ]
    record["final"] = [
        {"row": name, **vars(trial), "results": recorded(found[name], args.seeds)}
        for name, trial in rows.items()
    ]
    bench.store.publish(args.name, record, text)
    print(f"\n{text}\n\nWritten to {args.out}")


def described(trial: Trial) -> str:
    """Return a trial's settings as Markdown."""
    settings = [f"`{name}={value}`" for name, value in (trial.options | trial.loss).items()]
    return ", ".join(settings) or "what the demo has"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    parser = study_parser(__doc__, "runs/study")
    add = parser.add_argument_group("study").add_argument
    add("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="default: all")
    add("--trials", type=int, default=12, help="settings of each method (default: 12)")
    add("--rungs", type=int, nargs="+", default=[3, 6, 12], help="epochs (default: 3 6 12)")
    add("--epochs", type=int, default=12, help="of the winners (default: 12)")
    add("--name", default="study", help="of the files (default: study)")
    add("--validation", type=int, default=1000, help="images to choose by (default: 1000)")
    args = parse_study(parser, argv, trials=1, rungs=1, epochs=1, validation=1)
    args.methods = [method for method in METHODS if method in args.methods]
    if args.rungs != sorted(set(args.rungs)):
        parser.error(f"--rungs: expected epochs that rise from rung to rung, got {args.rungs}")
    for method in args.methods:
        if args.trials > settings_in(method):
            most = f"{METHODS[method].label} has no more than {settings_in(method)} settings"
            parser.error(f"--trials {args.trials}: {most}")
    return exit_code("study.py", lambda: study(args), args.out)
