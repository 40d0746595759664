"""How large the gradient of each term is while C2BIN trains: why the printed form fails.

    python examples/gradient_sizes.py [--out runs/gradients]

Trains C2BIN once per form of the loss and takes, every few steps, the norm of the gradient of each
weighted term with respect to the features of a batch: the alignment, and the contrast and entropy
of each head. Writes gradients.json, gradients.md and gradients.png to --out. Ctrl-C at any time:
the same command goes on.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.evaluation import Features, lightly_knn
from experiments.options import exit_code
from experiments.report import markdown, sentence
from experiments.runs import Bench, Job, Trial, carry_out, parse_study, study_parser
from experiments.store import Result

# Of the picture: smaller gradients are nothing beside the others.
FLOOR = 1e-6
# With the paper's wiring, weights and temperature, so that the formulas alone differ.
PAPERS = {"cluster_weight": 2.0, "entropy_weight": 1.0, "temperature": 0.5}
FORMS: dict[str, dict[str, Any]] = {
    "cosines": PAPERS,
    "dot products": {**PAPERS, "similarity": "dot"},
    "entropy summed": {**PAPERS, "reduction": "sum"},
    "as printed": {"formulas": "printed"},
    "as printed, entropy weight 1/n": {"formulas": "printed", "entropy_weight": 1 / 128},
}


def looked(model: Any, job: Job, folder: Path, train: Features, test: Features) -> Result:
    """Return what a run of `WatchedC2BIN` saw, and its kNN accuracy."""
    return {"knn5": lightly_knn(train, test, k=5), "rows": model.rows}


def mean(rows: list[dict[str, float]], name: str) -> float:
    """Return the mean of one number over rows."""
    return statistics.fmean(row[name] for row in rows)


def run(args: Any) -> None:
    """Watch every form; write the table, the numbers and the picture."""
    bench, wiring = Bench(args, args.epochs), {"against": "runner", "normalize": False}
    record = bench.about()
    record["settings"]["epochs"] = args.epochs
    bench.store.claim("gradients", record["settings"], args.overwrite)
    jobs = [
        replace(job, label=form)
        for form, loss in FORMS.items()
        for job in bench.jobs(Trial("watched", wiring, loss), args.epochs, args.seeds[:1])
    ]
    contents = carry_out(jobs, bench.store, args, "forms", scored_by=looked)
    found = dict(zip(FORMS, contents, strict=True))
    table = []
    for form, content in found.items():
        part = -(-len(content["rows"]) // 5)
        middle = (len(content["rows"]) - part) // 2
        spans = {"first fifth": 0, "middle": middle, "last fifth": len(content["rows"]) - part}
        for span, start in spans.items():
            rows = content["rows"][start : start + part]
            head = next(name for name in rows[0] if name.startswith("contrast"))
            entropy = head.replace("contrast", "entropy")
            values = [mean(rows, name) for name in ("alignment", head, entropy)]
            table.append(
                [
                    form if span == "first fifth" else "",
                    span,
                    *(f"{value:.2g}" for value in values),
                    f"{mean(rows, 'confidence'):.2f}",
                    f"{mean(rows, 'effective'):.1f}",
                    f"{100 * content['knn5']:.1f}" if span == "last fifth" else "",
                ]
            )
    head = ["form", "steps", "alignment", "contrast, first head", "entropy, first head"]
    head += ["confidence", "effective clusters", "kNN k=5, at the end"]
    text = "\n\n".join(
        [
            markdown(head, table, left=(0, 1)),
            f"Norm of each weighted term's gradient with respect to the features of a batch, both "
            f"views, {args.epochs} epochs. Confidence: the mean largest entry of an assignment of "
            f"the first head. {sentence(record['settings'])}",
        ]
    )
    record["forms"] = {
        form: {"loss": FORMS[form], "knn5": content["knn5"], "rows": content["rows"]}
        for form, content in found.items()
    }
    bench.store.publish("gradients", record, text)
    picture(args.out / "gradients.png", {form: found[form]["rows"] for form in FORMS})
    print(f"\n{text}\n\nWritten to {args.out}")


def picture(path: Path, forms: dict[str, list[dict[str, float]]]) -> None:
    """Draw each form's norms over the steps, all on one logarithmic scale."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, 3, figsize=(10, 6), sharex=True, sharey=True, layout="constrained"
    )
    first = next(iter(forms.values()))[0]
    styles = {
        "alignment": ("#000000", "-"),
        "contrast": ("#0072B2", "-"),
        "entropy": ("#D55E00", "--"),
    }
    names = sorted(
        (name for name in first if name.partition(",")[0] in styles),
        key=lambda name: list(styles).index(name.partition(",")[0]),
    )
    top = 2 * max(row[name] for rows in forms.values() for row in rows for name in names)
    *panels, corner = axes.flat
    for axis, (form, rows) in zip(panels, forms.items(), strict=True):
        for name in names:
            kind = name.partition(",")[0]
            heads = [other for other in names if other.startswith(kind)]
            colour, line = styles[kind]
            axis.plot(
                [row["step"] for row in rows],
                # What has vanished runs along the bottom.
                [max(row[name], FLOOR) for row in rows],
                line,
                color=colour,
                alpha=1 - 0.3 * heads.index(name),  # lighter for larger heads
                lw=1.4,
                label=name,
            )
        axis.set_title(form, fontsize=11)
        axis.set(yscale="log", ylim=(FLOOR, top))
    for axis in axes[:, 0]:
        axis.set_ylabel("norm of the gradient")
    for axis in (*axes[1, :2], axes[0, 2]):
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    corner.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    corner.legend(handles, labels, loc="center", frameon=False, title="gradient of")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    parser = study_parser(__doc__, "runs/gradients")
    parser.add_argument("--epochs", type=int, default=15, help="default: 15")
    # Views made on the way, and one seed: gradients are looked at, not compared.
    parser.set_defaults(seeds=[0])
    args = parse_study(parser, argv, epochs=1)
    args.channels_last = False
    args.views = "tensors" if args.views == "tensors" else "made"
    return exit_code("gradient_sizes.py", lambda: run(args), args.out)
