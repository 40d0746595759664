"""What each open choice of the objective does: one training run of C2BIN per choice and seed.

    python examples/decisions.py [--out runs/decisions]

Every run is `examples/demo.py` with the same images, backbone and budget; only C2BINLoss differs.
The result is a table of means and standard deviations over seeds, as decisions.md and
decisions.json in --out. Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import demo
from tqdm import tqdm

CHOICES: dict[str, list[str]] = {
    "default": [],
    "dot": ["similarity=dot"],
    "positive left out": ["positive_in_denominator=False"],
    "one direction": ["symmetric=False"],
    "no entropy": ["entropy_weight=0"],
    "entropy summed": ["reduction=sum"],
    "temperature 0.1": ["temperature=0.1"],
    "cluster weight 0.5": ["cluster_weight=0.5"],
    "cluster weight 0.2": ["cluster_weight=0.2"],
    # A step has a tenth of the smoothed statistics and of their gradient: with the default's weight
    # the cluster terms pull like those of weight 0.2, with weight 20 like the default's.
    "statistics over 10 steps": ["running_decay=0.9"],
    "statistics over 10 steps, weight 20": ["running_decay=0.9", "cluster_weight=20"],
    "as printed": [
        "similarity=dot",
        "positive_in_denominator=False",
        "symmetric=False",
        "symmetric_alignment=False",
        "reduction=sum",
    ],
}


def score(folder: Path, method: str, seeds: list[int]) -> dict[str, list[float]]:
    """Return per score one value a seed, from the results of one run of the demo."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    runs = [results[method][str(seed)] for seed in seeds]
    kmeans = [run["clustering"][0] for run in runs]
    scores = {
        "linear probe": [100 * run["linear"] for run in runs],
        "kNN k=5": [100 * run["knn5"] for run in runs],
        "kNN k=200": [100 * run["knn200"] for run in runs],
        "k-means NMI": [row["nmi"] for row in kmeans],
    }
    heads = [[row for row in run["clustering"] if row["by"] == "own head"] for run in runs]
    for i, head in enumerate(heads[0]):
        scores[f"in use, K={head['k']}"] = [rows[i]["in_use"] for rows in heads]
    return scores


def main() -> int:
    """Run every choice, or what is left of them, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/decisions"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--limit", type=int, help="at most this many training images")
    parser.add_argument("--num-clusters", type=int, nargs="+", default=[32, 64, 128], metavar="K")
    parser.add_argument("--only", nargs="+", choices=[*CHOICES], default=[*CHOICES])
    args = parser.parse_args()

    shared = ["--epochs", str(args.epochs), "--batch-size", str(args.batch_size)]
    shared += ["--seeds", *map(str, args.seeds)]
    shared += ["--num-clusters", *map(str, args.num_clusters)]
    shared += ["--limit", str(args.limit)] if args.limit else []
    runs = {"BYOL, no cluster terms": ("byol", [])}
    runs |= {choice: ("c2bin", CHOICES[choice]) for choice in args.only}
    rows: dict[str, dict[str, list[float]]] = {}
    for choice, (method, options) in tqdm(runs.items(), desc="choices", position=2):
        folder = args.out / choice.replace(" ", "-").replace(",", "")
        command = [*shared, "--methods", method, "--out", str(folder)]
        command += ["--loss", *options] if options else []
        with contextlib.redirect_stdout(io.StringIO()):
            code = demo.main(command)
        if code:
            return code
        rows[choice] = score(folder, method, args.seeds)
    write(args.out, rows, folder)
    return 0


def write(out: Path, rows: dict[str, dict[str, list[float]]], last: Path) -> None:
    """Write the table, and every number with settings, versions and hardware."""
    columns = max((list(scores) for scores in rows.values()), key=len)
    lines = [f"| objective | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for choice, scores in rows.items():
        cells = [cell(scores.get(column, []), column) for column in columns]
        name = f"{choice}: `{', '.join(CHOICES[choice])}`" if CHOICES.get(choice) else choice
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    everything: dict[str, Any] = json.loads((last / "results.json").read_text(encoding="utf-8"))
    kept = {name: everything[name] for name in ("settings", "seeds", "versions", "hardware")}
    kept["settings"].pop("loss", None)
    demo.write(out / "decisions.json", json.dumps({**kept, "scores": rows}, indent=1) + "\n")
    demo.write(out / "decisions.md", table)
    print(f"\n{table}\nWritten to {out}")


def cell(values: list[float], column: str) -> str:
    """Return mean ± standard deviation."""
    if not values:
        return ""
    form = ".3f" if "NMI" in column else ".1f"
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


if __name__ == "__main__":
    sys.exit(main())
