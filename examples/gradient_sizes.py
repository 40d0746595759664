"""How large the gradient of each term is while C2BIN trains: why the printed form fails.

    python examples/gradient_sizes.py [--out runs/gradients]

Trains C2BIN once per form of the loss and takes, every few steps, the norm of the gradient of each
weighted term with respect to the features of a batch: the alignment, and the contrast and entropy
of each head. Writes gradients.json, gradients.md and gradients.png to --out. Ctrl-C at any time:
the same command goes on.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from _demo_options import exit_code
from _demo_report import markdown
from _demo_training import features_of, fit
from _study_runs import Bench, about, hush, objective, parse, parser_of, sentence
from c2bin_explore.backbones import backbone
from c2bin_lightly import C2BIN
from c2bin_lightly.methods import Branches
from demo import BOOTSTRAP, LR_PER_IMAGE, OPTIMIZATION, write
from experiments import evaluation as evaluate
from torch import Tensor
from tqdm import tqdm

from c2bin_ext.functional import cluster_entropy_regularizer

# How often a batch is looked at.
EVERY = 5
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


class WatchedC2BIN(C2BIN):
    """C2BIN that keeps, every few steps, the gradient norm of each weighted term.

    Attributes:
        rows: One for each step looked at: `step`, the norms, and the share of the largest entry in
            an average assignment of the first head.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: list[dict[str, float]] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the rows, for a run that is resumed."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["gradients"] = self.rows

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the rows of the epochs before."""
        super().on_load_checkpoint(checkpoint)
        self.rows = checkpoint["gradients"]

    def losses(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        """Return the losses of one batch, unchanged."""
        branches = self.method.branches(view0, view1)
        if self.global_step % EVERY == 0:
            self.rows.append(self.look(branches))
        return self.method.objective(branches)

    def look(self, branches: Branches) -> dict[str, float]:
        """Return the norms of this step."""
        features = branches.features
        loss = self.criterion.loss
        heads = tuple(map(self.cluster_head, features))
        terms: dict[str, Tensor] = {}
        for view0, view1 in zip(*heads, strict=True):
            k = view0.shape[1]
            parts = loss(branches.predictions, branches.targets, ([view0], [view1]))
            terms["alignment"] = parts.alignment
            terms[f"contrast, K={k}"] = loss.cluster_weight * parts.contrast
            terms[f"entropy, K={k}"] = loss.cluster_weight * loss.entropy_weight * parts.entropy
        row = {"step": float(self.global_step)}
        for name, term in terms.items():
            grads = torch.autograd.grad(term, features, retain_graph=True, allow_unused=True)
            row[name] = sum(float(g.square().sum()) for g in grads if g is not None) ** 0.5
        with torch.no_grad():
            row["confidence"] = float(heads[0][0].amax(dim=1).mean())
            k = heads[0][0].shape[1]
            row["effective"] = float(k * (-cluster_entropy_regularizer(heads[0][0])).exp())
        return row


def watch(bench: Bench, form: str) -> dict[str, Any]:
    """Train one form, or read what an earlier call found; its rows and its kNN accuracy."""
    args, images, seed = bench.args, bench.images, bench.args.seeds[0]
    settings = {
        "form": form,
        "loss": FORMS[form],
        "epochs": args.epochs,
        "seed": seed,
        "batch_size": args.batch_size,
        "backbone": args.backbone,
        "pixels": images.fingerprint(),
    }
    # By its settings: a run of others has a checkpoint that must not be gone on from.
    folder = bench.folder({"method": "watched", **settings})
    done = folder / "gradients.json"
    if done.exists():
        content: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return content
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    net, features = backbone(args.backbone, images.size)
    lr = LR_PER_IMAGE * args.batch_size
    loss = objective(FORMS[form])
    model = WatchedC2BIN(
        net,
        features,
        lr=lr,
        loss=loss,
        against="runner",
        normalize=False,
        **OPTIMIZATION,
        **BOOTSTRAP,
    )
    with tqdm(total=args.epochs, desc=form, unit="epoch", disable=None) as overall:
        fit(
            model,
            form,
            images,
            folder / "last.ckpt",
            seed,
            overall,
            dataset=args.dataset,
            epochs=args.epochs,
            batch_size=args.batch_size,
            accelerator=args.accelerator,
            devices=1,
            precision=args.precision,
            workers=args.workers,
            scored=False,
        )
    train = features_of(net, images.train, images.train_labels)
    test = features_of(net, images.test, images.test_labels)
    knn = evaluate.knn_accuracy(train, test, k=5)
    content = {"settings": settings, "knn5": knn, "rows": model.rows}
    write(done, json.dumps(content, indent=1) + "\n")
    return content


def mean(rows: list[dict[str, float]], name: str) -> float:
    """Return the mean of one number over rows."""
    return statistics.fmean(row[name] for row in rows)


def run(args: Any) -> None:
    """Watch every form; write the table, the numbers and the picture."""
    bench = Bench(args, args.epochs)
    found = {form: watch(bench, form) for form in FORMS}
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
            f"the first head. {sentence(bench)}",
        ]
    )
    record = about(bench)
    record["settings"]["epochs"] = args.epochs
    record["forms"] = {
        form: {"loss": FORMS[form], "knn5": content["knn5"], "rows": content["rows"]}
        for form, content in found.items()
    }
    write(args.out / "gradients.json", json.dumps(record) + "\n")
    write(args.out / "gradients.md", text + "\n")
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
    parser = parser_of(__doc__, "runs/gradients")
    parser.add_argument("--epochs", type=int, default=15, help="default: 15")
    parser.set_defaults(seeds=[0])
    args = parse(parser, argv, epochs=1)
    hush()
    return exit_code("gradient_sizes.py", lambda: run(args), args.out)


if __name__ == "__main__":
    sys.exit(main())
