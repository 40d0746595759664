"""Train the methods long, each as it was tuned, and score them every few epochs.

    python examples/learning_curves.py --data FOLDER --tensor-views

Rows: SimCLR, MoCo v2, BYOL and C2BIN with the settings that won in docs/results/study.md, C2BIN
with the weights and the wiring of the paper's Table 5, C2BIN that looks for near neighbours in the
second half of the run; untuned, IIC, PICA and CC. Scores are of test images, on frozen features;
nothing is chosen by them. Writes NAME.md, NAME.json and NAME.png to --out. Ctrl-C at any time: the
same command goes on; with --so-far it writes the tables of the epochs that are there.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from experiments.decisions import ONCE
from experiments.methods import KINDS, METHODS
from experiments.options import exit_code
from experiments.report import HEAD, SCORES, cells, markdown, recorded, sentence
from experiments.runs import Bench, Job, Trial, parse_study, study_parser
from experiments.store import ExperimentError, Result
from experiments.study import TUNED
from experiments.training import Progress

ROWS: dict[str, Trial] = {
    **{f"{METHODS[name].label}, tuned": trial for name, trial in TUNED.items()},
    "C2BIN, Table 5": Trial("c2bin", *ONCE),
    "C2BIN, near neighbours": Trial("c2bin", {"neighbours": 0.5}),
    **{KINDS[name].label: Trial(name) for name in ("iic", "pica", "cc")},
}
# Keys of a curve's points, their names, and what they are multiplied by.
SHOWN = {
    "knn200": ("kNN, k = 200, in %", 100.0),
    "kmeans_nmi": ("k-means NMI", 1.0),
    "heads_nmi": ("heads' NMI", 1.0),
}


def points(result: Result) -> dict[int, dict[str, float]]:
    """Return the scores that were taken on the way, by epoch."""
    found = {}
    for row in result["curve"]:
        if "knn200" in row:
            heads = [value for name, value in row.items() if name.startswith("nmi_of_")]
            more = {"heads_nmi": statistics.fmean(heads)} if heads else {}
            found[int(row["epoch"])] = row | more
    return found


def table_of(curves: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return kNN and k-means NMI of every row at every epoch that was scored."""
    epochs = sorted({epoch for curve in curves.values() for epoch in curve})

    def cell(point: dict[str, float]) -> str:
        return f"{100 * point['knn200']:.1f} / {point['kmeans_nmi']:.3f}"

    rows = [
        [name, *(cell(curve[e]) if e in curve else "" for e in epochs)]
        for name, curve in curves.items()
    ]
    return markdown(["kNN k=200 / k-means NMI after epoch", *map(str, epochs)], rows)


def reached(bench: Bench, trials: Sequence[Trial], args: Any) -> list[list[Result]]:
    """Return for each trial what its runs have so far: results, or curves alone; train nothing."""
    found = []
    for trial in trials:
        jobs = bench.jobs(trial, args.epochs, args.seeds)
        found.append([result for job in jobs if (result := _reached(bench, job))])
    if not any(found):
        raise ExperimentError(f"--so-far: {args.out} has no run of these settings")
    return found


def _reached(bench: Bench, job: Job) -> Result | None:
    path = bench.store.folder(job.name, job.settings) / "last.ckpt"
    result = bench.store.result(job.name, job.settings)
    if result is None and path.exists():
        states = torch.load(path, weights_only=True, map_location="cpu")["callbacks"]
        curve = states[Progress.__qualname__]["curve"]
        seconds = statistics.median(row["seconds"] for row in curve)
        result = {"curve": curve, "seconds_per_epoch": seconds}
    return result


def run(args: Any) -> None:
    """Train, write the tables and the picture."""
    from experiments.pictures import scores

    bench = Bench(args, args.epochs)
    record = bench.about()
    record["settings"] |= {"epochs": args.epochs}
    bench.store.claim(args.name, record["settings"], args.overwrite)
    trials = {row: ROWS[row] for row in args.rows}
    results = (
        reached(bench, [*trials.values()], args)
        if args.so_far
        else bench.results("curves", [*trials.values()], args.epochs, args.seeds, final=True)
    )
    found = {row: each for row, each in zip(trials, results, strict=True) if each}
    curves = {row: points(each[0]) for row, each in found.items()}
    ended = {row: each for row, each in found.items() if all("knn200" in one for one in each)}
    open_rows = [f"{row} {len(found[row][0]['curve'])}" for row in found if row not in ended]
    seconds = ", ".join(f"{row} {each[0]['seconds_per_epoch']:.1f}" for row, each in found.items())
    parts = [table_of(curves)]
    if ended:
        parts += [markdown(["at the end", *HEAD], [[row, *cells(ended[row])] for row in ended])]
    parts += [
        f"{sentence(record['settings'])} {args.epochs} epochs; curves of seed {args.seeds[0]}. "
        f"{SCORES} On the way k-means is fitted on at most 10,000 images, with three starts. "
        f"Seconds an epoch: {seconds}."
    ]
    if open_rows:
        parts += [f"Not scored at the end, whole epochs so far: {', '.join(open_rows)}."]
    text = "\n\n".join([*parts, f"![Scores while training]({args.name}.png)"])
    record["rows"] = [
        {
            "row": row,
            **vars(trials[row]),
            "results": recorded(each, args.seeds[: len(each)]),
            "curve": curves[row],
        }
        for row, each in found.items()
    ]
    scores(args.out / f"{args.name}.png", curves, SHOWN)
    bench.store.publish(args.name, record, text)
    print(f"\n{text}\n\nWritten to {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    parser = study_parser(__doc__, "runs/learning_curves")
    add = parser.add_argument_group("curves").add_argument
    add("--epochs", type=int, default=60, help="default: 60")
    add("--rows", nargs="+", choices=[*ROWS], default=[*ROWS], metavar="ROW", help="default: all")
    add("--so-far", action="store_true", help="train nothing: the tables of what is there by now")
    add("--name", default="learning_curves", help="of the files (default: learning_curves)")
    parser.set_defaults(batch_size=256, seeds=[1], curves="all")
    args = parse_study(parser, argv, epochs=1)
    args.rows = [row for row in ROWS if row in args.rows]
    return exit_code("learning_curves.py", lambda: run(args), args.out)
