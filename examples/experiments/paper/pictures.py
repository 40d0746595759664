"""The figures of the paper that the demo does not draw."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.patches import Patch

from experiments.data import Images
from experiments.pictures import COLOURS, MARKERS, TSNE_IMAGES, class_legend, embedding, plt

# One colour and marker a method, in every figure.
STYLES = {"SimCLR": 0, "BYOL": 1, "C2BIN": 2, "PICA": 3}
RIGHT, WRONG = "#117733", "#CC3311"


def _lines(path: Path, curves: dict[str, dict[float, list[float]]], x: str, y: str) -> None:
    """Draw one line a method: means over seeds, with bars of the standard deviation."""
    figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for name, curve in curves.items():
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in curve.values()]
        axis.errorbar(
            list(curve),
            [statistics.fmean(values) for values in curve.values()],
            yerr=spread,
            color=COLOURS[2 * STYLES[name]],
            marker=MARKERS[STYLES[name]],
            capsize=3,
            label=name,
        )
    axis.set(xlabel=x, ylabel=y, xscale="log")
    ticks = list(next(iter(curves.values())))
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def degradation(path: Path, drops: dict[str, dict[float, list[float]]]) -> None:
    """Draw Figure 4: points of accuracy lost against the balance rate."""
    _lines(path, drops, "balance rate (largest class to smallest)", "loss of LP, in points")


def precision(path: Path, curves: dict[str, dict[float, list[float]]]) -> None:
    """Draw Figure 8: the share of right images among the k nearest."""
    _lines(path, curves, "k nearest images", "precision at k, in %")


def evolution(
    path: Path,
    features: dict[str, list[npt.NDArray[Any]]],
    scores: dict[str, list[dict[str, float]]],
    epochs: Sequence[int],
    labels: npt.NDArray[Any],
    classes: list[str],
    seed: int,
) -> None:
    """Draw Figure 5: one row a method, one column an epoch, t-SNE with its ARI."""
    keep = np.arange(len(labels))[:: -(-len(labels) // TSNE_IMAGES)]
    figure, axes = plt.subplots(
        len(features), len(epochs), figsize=(3.5 * len(epochs), 3.8 * len(features)), squeeze=False
    )
    for line, (name, each) in zip(axes, features.items(), strict=True):
        for axis, rows, score, epoch in zip(line, each, scores[name], epochs, strict=True):
            embedding(axis, rows[keep], labels[keep], seed)
            text = ", ".join(f"{key} {value:.2f}" for key, value in score.items())
            axis.set_title(f"{name}, epoch {epoch}\n{text}", fontsize=10)
    figure.subplots_adjust(left=0.01, right=0.99, wspace=0.04, hspace=0.16)
    class_legend(figure, classes, markers=True, top=1 - 0.5 / figure.get_size_inches()[1])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def retrieved(
    path: Path,
    images: Images,
    queries: Sequence[int],
    found: dict[str, npt.NDArray[Any]],
    ranks: Sequence[int],
) -> None:
    """Draw Figures 6 and 7: a query a row, then each method's image at some ranks."""
    labels = images.test_labels.numpy()
    # A narrow empty column stands between the methods.
    widths = [1.0] + [w for _ in found for w in (0.35, *[1.0] * len(ranks))]
    height = 0.66 * len(queries) + 1.2
    figure, axes = plt.subplots(
        len(queries),
        len(widths),
        figsize=(0.62 * sum(widths) + 0.9, height),
        gridspec_kw={"width_ratios": widths},
        squeeze=False,
    )

    def show(axis: Any, image: int, colour: str) -> None:
        axis.set_visible(True)
        axis.set(xticks=[], yticks=[])
        axis.imshow(images.test[image].permute(1, 2, 0).numpy(), interpolation="nearest")
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=2.5)
        if colour == WRONG:  # for those who cannot tell the colours apart
            box = {"facecolor": WRONG, "edgecolor": "none", "pad": 0.8}
            axis.text(
                0.9, 0.1, "×", ha="center", va="center", fontsize=6, color="white",
                transform=axis.transAxes, bbox=box,
            )  # fmt: skip

    for axis in axes.flat:
        axis.set_visible(False)
    for r, query in enumerate(queries):
        show(axes[r, 0], query, "black")
        axes[r, 0].set_ylabel(
            images.classes[labels[query]][:12], rotation=0, ha="right", va="center", fontsize=8
        )
        column = 1
        for name, indices in found.items():
            for i, rank in enumerate(ranks):
                axis, image = axes[r, column + 1 + i], int(indices[r, i])
                right = bool(labels[image] == labels[query])
                show(axis, image, RIGHT if right else WRONG)
                if r == 0:
                    title = f"{name}\n" if i == len(ranks) // 2 else "\n"
                    axis.set_title(f"{title}{rank}", fontsize=9)
            column += 1 + len(ranks)
    axes[0, 0].set_title("\nquery", fontsize=9)
    inches = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.85 / inches[0], right=0.99, top=1 - 0.55 / height, bottom=0.4 / height,
        wspace=0.1, hspace=0.12,
    )  # fmt: skip
    figure.legend(
        handles=[
            Patch(edgecolor=RIGHT, facecolor="none", linewidth=2.5, label="right class"),
            Patch(edgecolor=WRONG, facecolor="none", linewidth=2.5, label="wrong class, ×"),
        ],
        loc="lower center",
        ncols=2,
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
