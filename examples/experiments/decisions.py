"""What each open choice of C2BIN does, by measurement.

    python examples/decisions.py                   the default with one thing changed at a time
    python examples/decisions.py together          three choices, in every combination
    python examples/decisions.py printed           the printed formulas with other weights
    python examples/decisions.py entropy --validation 250 --choose        the entropy weight
    python examples/decisions.py many_clusters --num-clusters 512 1024 --batch-size 64
    python examples/decisions.py beyond --tensor-views                    what SimCLR's lead may be
    python examples/decisions.py finetune --backbone efficientnet-lite0 --image-size 64
    python examples/decisions.py TABLE --data FOLDER --limit 5000 --processes 2

Every run has the same images, views, backbone, batches and epochs; without --data they are
scikit-learn's digits. Writes NAME.md and NAME.json to --out: means and standard deviations over
seeds. Ctrl-C at any time: the same command goes on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.methods import FLOOR, METHODS
from experiments.options import exit_code
from experiments.report import HEAD, SCORES, cells, markdown, recorded, sentence
from experiments.runs import Bench, Trial, parse_study, study_parser
from experiments.study import TUNED

Choice = tuple[dict[str, Any], dict[str, Any]]  # options of the method, and of its loss
BYOL = "BYOL, no cluster terms"
DEFAULT: Choice = ({}, {})
PAPERS = "the paper's weights"
# The wiring of the paper with the temperature and the cluster weight of its Table 5.
WIRING = {"against": "runner", "normalize": False}
ONCE: Choice = (WIRING, {"temperature": 0.5, "cluster_weight": 2.0})
# What decided the defaults: the choices that moved most when they were changed one at a time, on
# features as they are; L2-normalised features came after.
TOGETHER: dict[str, Choice] = {
    f"{against}, temperature {temperature}, weight {weight}": (
        {"against": against, "normalize": False},
        {"temperature": temperature, "cluster_weight": weight},
    )
    for against in ("runner", "follower")
    for temperature in (0.5, 0.1)
    for weight in (2.0, 0.5)
}
AS_PRINTED = {"formulas": "printed"}
ONE_AT_A_TIME: dict[str, Choice] = {
    "default": DEFAULT,
    PAPERS: ONCE,
    "against the runner": ({"against": "runner"}, {}),
    "temperature 0.5": ({}, {"temperature": 0.5}),
    "temperature 0.2": ({}, {"temperature": 0.2}),
    "temperature 0.05": ({}, {"temperature": 0.05}),
    "cluster weight 2": ({}, {"cluster_weight": 2.0}),
    "cluster weight 0.2": ({}, {"cluster_weight": 0.2}),
    "dot": ({}, {"similarity": "dot"}),
    "positive left out": ({}, {"positive_in_denominator": False}),
    "one direction": ({}, {"symmetric": False}),
    "alignment in one direction": ({}, {"symmetric_alignment": False}),
    "no entropy": ({}, {"entropy_weight": 0.0}),
    "entropy weight 2": ({}, {"entropy_weight": 2.0}),
    "entropy summed": ({}, {"reduction": "sum"}),
    "heads of 10, 20, 40": ({"num_clusters": [10, 20, 40]}, {}),
    "heads of 128, 256, 512": ({"num_clusters": [128, 256, 512]}, {}),
    "cluster weight warmed up": ({"warmup": 0.25}, {}),
    "features as they are": ({"normalize": False}, {}),
    "features standardised": ({"normalize": False, "standardize": True}, {}),
    "momentum to 1": ({"follower_schedule": "cosine"}, {}),
    "as printed": (WIRING, AS_PRINTED),
}
# Where the printed formulas train: n times less entropy, n times less of both, other temperatures,
# one formula at a time in its usual form, the default wiring. n is the default batch of 128.
SCALED = AS_PRINTED | {"entropy_weight": 1 / 128}
PRINTED: dict[str, Choice] = {
    PAPERS: ONCE,
    "as printed": (WIRING, AS_PRINTED),
    "cluster weight 2/n": (WIRING, AS_PRINTED | {"cluster_weight": 2 / 128}),
    "cluster weight 0.5/n": (WIRING, AS_PRINTED | {"cluster_weight": 0.5 / 128}),
    "entropy weight 1/n": (WIRING, SCALED),
    "entropy weight 10/n": (WIRING, SCALED | {"entropy_weight": 10 / 128}),
    "entropy weight 1/n, cluster weight 0.1": (WIRING, SCALED | {"cluster_weight": 0.1}),
    "entropy weight 1/n, temperature 4": (WIRING, SCALED | {"temperature": 4.0}),
    "entropy weight 1/n, temperature 16": (WIRING, SCALED | {"temperature": 16.0}),
    "entropy weight 1/n, positive kept": (WIRING, SCALED | {"positive_in_denominator": True}),
    "entropy weight 1/n, cosine": (WIRING, SCALED | {"similarity": "cosine"}),
    "entropy weight 1/n, against the follower, L2-normalised features": (
        {"against": "follower", "normalize": True},
        SCALED,
    ),
}
MANY_CLUSTERS: dict[str, Choice] = {
    "default": DEFAULT,
    PAPERS: ONCE,
    "weight 0.2": (ONCE[0], ONCE[1] | {"cluster_weight": 0.2}),
    # A step has a tenth of the smoothed statistics and of their gradient: with the paper's weight
    # the cluster terms pull like those of a tenth of it, with ten times the weight like its own.
    "statistics over 10 steps": (ONCE[0] | {"decay": 0.9}, ONCE[1]),
    "statistics over 10 steps, weight 20": (
        ONCE[0] | {"decay": 0.9},
        ONCE[1] | {"cluster_weight": 20.0},
    ),
    "queue of 512 images": (ONCE[0] | {"queue": 512}, ONCE[1]),
    "against the runner": ({"against": "runner"}, {}),
    "against the runner, weight 0.05": ({"against": "runner"}, {"cluster_weight": 0.05}),
    "against the runner, statistics over 10 steps": ({"against": "runner", "decay": 0.9}, {}),
}
ENTROPY: dict[str, Choice] = {
    f"entropy weight {weight:g}": ({}, {"entropy_weight": weight})
    for weight in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
}
# From a pretrained network on, at a tenth of the learning rate, beside its features as they are.
FINETUNE = {"frozen": Trial(FLOOR)} | {
    f"{METHODS[method].label}, learning rate 0.006": Trial(method, {"lr": 0.006})
    for method in ("simclr", "byol", "c2bin")
}
# Beyond the paper, where the default stays behind SimCLR.
SIX_HEADS = {"num_clusters": [16, 32, 64, 128, 256, 512]}
BEYOND: dict[str, Choice | Trial] = {
    "default": DEFAULT,
    "SimCLR, tuned": TUNED["simclr"],
    "BYOL, tuned": TUNED["byol"],
    **{f"follower's softmax at {t:g}": ({"sharpen": t}, {}) for t in (0.5, 0.25, 0.1)},
    **{f"both softmaxes at {t:g}": ({"softmax": t}, {}) for t in (0.25, 0.5, 2.0)},
    **{
        f"momentum from {m:g} to 1": ({"follower_momentum": m, "follower_schedule": "cosine"}, {})
        for m in (0.8, 0.9, 0.97)
    },
    "six heads, weight 0.25": (SIX_HEADS, {"cluster_weight": 0.25}),
    "six heads, weight 0.1": (SIX_HEADS, {"cluster_weight": 0.1}),
    "two small crops": ({"crops": 2}, {}),
    "four small crops": ({"crops": 4}, {}),
    "near neighbours from 3/4 on": ({"neighbours": 0.75}, {}),
    **{
        f"SimCLR, tuned, with clusters, weight {weight:g}": Trial(
            "clustered", {**TUNED["simclr"].options, "cluster_weight": weight}
        )
        for weight in (0.5, 0.1)
    },
}
TABLES: dict[str, Any] = {
    "beyond": BEYOND,
    "finetune": FINETUNE,
    "entropy": ENTROPY,
    "decisions": ONE_AT_A_TIME,
    "together": TOGETHER,
    "printed": PRINTED,
    "many_clusters": MANY_CLUSTERS,
}


def trial(choice: Choice | Trial, clusters: list[int]) -> Trial:
    """Return the run of one choice, with heads of `clusters` unless it says otherwise."""
    if isinstance(choice, Trial):
        heads = {"num_clusters": clusters} if choice.method in ("c2bin", "clustered") else {}
        return replace(choice, options={**heads, **choice.options})
    options, loss = choice
    return Trial("c2bin", {"num_clusters": clusters, **options}, loss)


def run(args: Any) -> None:
    """Run every choice; write the table, and every number with settings and versions."""
    bench, name = Bench(args, args.epochs), args.name or args.table
    record = bench.about()
    record["settings"] |= {"epochs": args.epochs, "num_clusters": args.num_clusters}
    bench.store.claim(name, record["settings"], args.overwrite)
    trials = {
        BYOL if method == "byol" else METHODS[method].label: Trial(method)
        for method in (args.baselines if args.table != "finetune" else ())
    }
    trials |= {
        row: trial(choice, args.num_clusters)
        for row, choice in TABLES[args.table].items()
        if row in (args.only or TABLES[args.table])
    }
    final = not args.choose
    results = bench.results(args.table, [*trials.values()], args.epochs, args.seeds, final)
    found = dict(zip(trials, results, strict=True))
    table = markdown(["C2BIN", *HEAD], [[row, *cells(runs)] for row, runs in found.items()])
    stated = sentence(record["settings"], "validation" if args.choose else "test")
    text = f"{table}\n\n{stated} {args.epochs} epochs. {SCORES}"
    record["choices"] = [
        {"row": row, **vars(run), "results": recorded(found[row], args.seeds)}
        for row, run in trials.items()
    ]
    bench.store.publish(name, record, text)
    if args.curves:
        from experiments.pictures import curves

        drawn = {"C2BIN" if row == "default" else row: runs[0] for row, runs in found.items()}
        curves(args.out / f"{name}.png", {row: result["curve"] for row, result in drawn.items()})
    print(f"\n{text}\n\nWritten to {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    parser = study_parser(__doc__, "runs/decisions")
    parser.add_argument(
        "table", nargs="?", choices=[*TABLES], default="decisions", help="default: decisions"
    )
    add = parser.add_argument_group("choices").add_argument
    add("--epochs", type=int, default=15, help="of every run (default: 15)")
    add("--num-clusters", type=int, nargs="+", default=[32, 64, 128], metavar="K")
    add("--only", nargs="+", metavar="ROW", help="rows of the table, by name (default: all)")
    add(
        "--baselines",
        nargs="+",
        choices=[method for method in METHODS if method != "c2bin"],
        default=["byol"],
        help="methods beside them, as in the demo (default: byol)",
    )
    add(
        "--curves",
        action="store_true",
        help="also draw kNN and losses while training, of the first seed, to NAME.png",
    )
    add("--name", help="of the files (default: the table's)")
    add(
        "--validation",
        type=int,
        default=0,
        help="leave out as many training images, as study.py does: with its --out, runs are shared",
    )
    add(
        "--choose",
        action="store_true",
        help="score on the --validation images in place of the test images: to choose a default by",
    )
    args = parse_study(parser, argv, epochs=1, num_clusters=2, validation=0)
    if args.choose and not args.validation:
        parser.error("--choose: expected --validation N, the images to choose by, got none")
    unknown = sorted(set(args.only or ()) - set(TABLES[args.table]))
    if unknown:
        rows = "; ".join(TABLES[args.table])
        parser.error(f"--only: expected rows of {args.table} ({rows}), got {unknown}")
    return exit_code("decisions.py", lambda: run(args), args.out)
