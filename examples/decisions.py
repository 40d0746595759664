"""What each open choice of C2BIN does: the default with one thing changed at a time.

    python examples/decisions.py                                       on scikit-learn's digits
    python examples/decisions.py --data FOLDER --limit 5000 --processes 2

Every run has the same images, views, backbone, batches and epochs. Writes NAME.md and NAME.json to
--out: means and standard deviations over seeds. Ctrl-C at any time: the same command goes on.
"""

from __future__ import annotations

import json
import sys
from typing import Any

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
from demo import write

# Options of the method, and of its loss. "BYOL" stands for no cluster terms at all.
CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "BYOL, no cluster terms": ({}, {}),
    "default": ({}, {}),
    "dot": ({}, {"similarity": "dot"}),
    "positive left out": ({}, {"positive_in_denominator": False}),
    "one direction": ({}, {"symmetric": False}),
    "alignment in one direction": ({}, {"symmetric_alignment": False}),
    "no entropy": ({}, {"entropy_weight": 0.0}),
    "entropy summed": ({}, {"reduction": "sum"}),
    "temperature 0.1": ({}, {"temperature": 0.1}),
    "temperature 0.2": ({}, {"temperature": 0.2}),
    "cluster weight 0.2": ({}, {"cluster_weight": 0.2}),
    "cluster weight 0.5": ({}, {"cluster_weight": 0.5}),
    "heads of 10, 20, 40": ({"num_clusters": [10, 20, 40]}, {}),
    "against the follower": ({"against": "follower"}, {}),
    "against the follower, temperature 0.2": ({"against": "follower"}, {"temperature": 0.2}),
    "against the follower, temperature 0.1": ({"against": "follower"}, {"temperature": 0.1}),
    "cluster weight warmed up": ({"warmup": 0.25}, {}),
    "features of equal length": ({"head_input": "length"}, {}),
    "features standardised": ({"head_input": "batch"}, {}),
    "momentum to 1": ({"follower_schedule": "cosine"}, {}),
    "as printed": ({}, {"formulas": "printed"}),
    # A step has a tenth of the smoothed statistics and of their gradient: with the default's weight
    # the cluster terms pull like those of a tenth of it, with ten times the weight like the
    # default's.
    "statistics over 10 steps": ({}, {"running_decay": 0.9}),
    "statistics over 10 steps, weight 20": ({}, {"running_decay": 0.9, "cluster_weight": 20.0}),
    "queue of 512 images": ({"queue": 512}, {}),
}
# What concerns more clusters than the batch has images is asked for by name.
USUAL = [name for name in CHOICES if not name.startswith(("statistics", "queue"))]


def trial(name: str, clusters: list[int]) -> Trial:
    """Return the run of one choice, with heads of `clusters` unless it says otherwise."""
    if name.startswith("BYOL"):
        return Trial("byol")
    options, loss = CHOICES[name]
    options = {"num_clusters": clusters, **options}
    if "running_decay" in loss:
        loss = {**loss, "num_clusters": options["num_clusters"]}
    return Trial("c2bin", options, loss)


def run(args: Any) -> None:
    """Run every choice; write the table, and every number with settings and versions."""
    bench = Bench(args, args.epochs)
    trials = [trial(name, args.num_clusters) for name in args.only]
    results = bench.results("choices", trials, args.epochs, args.seeds, final=True)
    found = dict(zip(args.only, results, strict=True))
    table = markdown(["C2BIN", *HEAD], [[name, *cells(runs)] for name, runs in found.items()])
    text = f"{table}\n\n{sentence(bench)} {args.epochs} epochs. {SCORES}"
    record = about(bench)
    record["settings"] |= {"epochs": args.epochs, "num_clusters": args.num_clusters}
    record["choices"] = [
        {"row": name, **vars(run), "results": recorded(found[name], args.seeds)}
        for name, run in zip(args.only, trials, strict=True)
    ]
    write(args.out / f"{args.name}.json", json.dumps(record, indent=1) + "\n")
    write(args.out / f"{args.name}.md", text + "\n")
    print(f"\n{text}\n\nWritten to {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    parser = parser_of(__doc__, "runs/decisions")
    add = parser.add_argument_group("choices").add_argument
    add("--epochs", type=int, default=15, help="of every run (default: 15)")
    add("--num-clusters", type=int, nargs="+", default=[32, 64, 128], metavar="K")
    add("--only", nargs="+", choices=[*CHOICES], default=USUAL, metavar="CHOICE", help="by name")
    add("--name", default="decisions", help="of the files (default: decisions)")
    add(
        "--validation",
        type=int,
        default=0,
        help="leave out as many training images, as study.py does: with its --out, runs are shared",
    )
    args = parse(parser, argv, epochs=1, num_clusters=2, validation=0)
    return exit_code("decisions.py", lambda: run(args), args.out)


if __name__ == "__main__":
    sys.exit(main())
