"""Tune C2BIN and its baselines with one budget, then compare them on seeds of their own.

    python examples/study.py --data FOLDER --limit 5000 --processes 2

Successive halving: every method gets as many settings, drawn at random from its own space (the
first is the demo's), and as many epochs. The best third of each rung goes on to the next, chosen by
kNN (k = 200) on validation images that are neither trained on nor tested on. Then each method's
winner, and its settings before tuning, are trained with fresh seeds and scored on the test images.

Writes NAME.md and NAME.json to --out. Ctrl-C at any time: the same command goes on.
"""

from __future__ import annotations

import json
import math
import random
import sys
from typing import Any

from _demo_data import DemoError
from _demo_options import exit_code
from _demo_report import markdown
from _study_runs import (
    HEAD,
    SCORES,
    Bench,
    Trial,
    about,
    cells,
    parse,
    parser_of,
    recorded,
    sentence,
)
from demo import METHODS, write

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


def draw(method: str, count: int) -> list[Trial]:
    """Return the settings to try: the demo's, then random ones, always alike."""
    spaces = [SPACES[method], LOSS if method == "c2bin" else {}]
    most = 1 + math.prod(len(values) for space in spaces for values in space.values())
    if count > most:
        raise DemoError(f"--trials {count}: {METHODS[method][0]} has no more than {most} settings")
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
    history = tune(bench, args.methods, args.trials, args.rungs)
    rows: dict[str, Trial] = {}
    for method in args.methods:
        label, (best, _) = METHODS[method][0], history[-1]["ranked"][method][0]
        rows[f"{label}, tuned"] = best
        rows[f"{label}, as in the demo"] = Trial(method)
    final = bench.results("winners", list(rows.values()), args.epochs, args.seeds, final=True)
    found = dict(zip(rows, final, strict=True))
    table = [[name, *cells(results)] for name, results in found.items()]
    spent = sum(rung["epochs"] * len(rung["ranked"][args.methods[0]]) for rung in history)
    chosen = [
        f"- {METHODS[method][0]}: {described(history[-1]['ranked'][method][0][0])}"
        for method in args.methods
    ]
    rungs = ", ".join(
        f"{len(rung['ranked'][args.methods[0]])} for {rung['epochs']} epochs" for rung in history
    )
    text = "\n\n".join(
        [
            markdown(["method", *HEAD], table),
            f"{sentence(bench)} {args.epochs} epochs. {SCORES} Each method was tuned for {spent} "
            f"epochs (settings: {rungs}) by kNN on {len(bench.validation.test)} other images.",
            "What won:",
            "\n".join(chosen),
        ]
    )
    record = about(bench)
    record["settings"] |= {"trials": args.trials, "rungs": args.rungs, "epochs": args.epochs}
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
    write(args.out / f"{args.name}.json", json.dumps(record, indent=1) + "\n")
    write(args.out / f"{args.name}.md", text + "\n")
    print(f"\n{text}\n\nWritten to {args.out}")


def described(trial: Trial) -> str:
    """Return a trial's settings as Markdown."""
    settings = [f"`{name}={value}`" for name, value in (trial.options | trial.loss).items()]
    return ", ".join(settings) or "what the demo has"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    parser = parser_of(__doc__, "runs/study")
    add = parser.add_argument_group("study").add_argument
    add("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="default: all")
    add("--trials", type=int, default=12, help="settings of each method (default: 12)")
    add("--rungs", type=int, nargs="+", default=[3, 6, 12], help="epochs (default: 3 6 12)")
    add("--epochs", type=int, default=12, help="of the winners (default: 12)")
    add("--name", default="study", help="of the files (default: study)")
    add("--validation", type=int, default=1000, help="images to choose by (default: 1000)")
    args = parse(parser, argv, trials=1, rungs=1, epochs=1, validation=1)
    args.methods = [method for method in METHODS if method in args.methods]
    return exit_code("study.py", lambda: study(args), args.out)


if __name__ == "__main__":
    sys.exit(main())
