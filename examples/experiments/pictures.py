"""The demo's pictures: curves, t-SNE side by side, and the images of a head's clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from sklearn.manifold import TSNE
from torch import Tensor

# Paul Tol's muted scheme and a grey, which stay apart for every kind of colour blindness and on
# black and white alike; markers tell more than ten classes apart.
COLOURS = [
    "#332288",
    "#88CCEE",
    "#117733",
    "#DDCC77",
    "#CC6677",
    "#AA4499",
    "#44AA99",
    "#999933",
    "#882255",
    "#888888",
]
MARKERS = ["o", "^", "s", "X", "D", "v", "P", "*"]
LEGEND_CLASSES = 40
TSNE_IMAGES = 2000


def _style(label: int) -> tuple[str, str]:
    return COLOURS[label % len(COLOURS)], MARKERS[label // len(COLOURS) % len(MARKERS)]


def _short(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def scores(
    path: Path,
    by_row: dict[str, dict[int, dict[str, float]]],
    panels: dict[str, tuple[str, float]],
) -> None:
    """Draw scores while training, a panel each.

    Args:
        path: Of the picture.
        by_row: For each row of a table, by epoch, its scores by key.
        panels: By key of a score, its title and what it is multiplied by.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (key, (title, factor)) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, points) in enumerate(by_row.items()):
            drawn = [(e, factor * point[key]) for e, point in points.items() if key in point]
            if drawn:
                axis.plot(
                    *zip(*drawn, strict=True),
                    color=COLOURS[i % len(COLOURS)],
                    marker=MARKERS[i % len(MARKERS)],
                    markersize=4,
                    label=name,
                )
        axis.set(title=title, xlabel="epoch")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(path: Path, by_method: dict[str, list[dict[str, float]]]) -> None:
    """Draw kNN while training, every loss, and C2BIN's parts and effective clusters."""
    parts = by_method.get("C2BIN", [])
    panels = 1 + len(by_method) + (2 if parts else 0)
    columns = min(4, panels)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 3.0 * rows), squeeze=False, layout="constrained"
    )
    free = iter(axes.flat)

    axis = next(free)
    for i, (name, curve) in enumerate(by_method.items()):
        points = [(row["epoch"], 100 * row["knn"]) for row in curve if "knn" in row]
        axis.plot(
            *zip(*points, strict=True),
            color=COLOURS[2 * i],
            marker=MARKERS[i],
            markersize=4,
            label=name,
        )
    axis.set(title="kNN, k = 5, while training", xlabel="epoch", ylabel="test accuracy in %")
    low, high = axis.get_ylim()
    axis.set_ylim(low - 0.25 * (high - low), high)  # room for the legend below the curves
    axis.legend(fontsize=8, loc="lower center", ncols=2)
    for i, (name, curve) in enumerate(by_method.items()):
        axis = next(free)
        axis.plot(
            [r["epoch"] for r in curve], [r["train_loss"] for r in curve], color=COLOURS[2 * i]
        )
        axis.set(title=f"{name}: training loss", xlabel="epoch")
    if parts:
        epochs = [row["epoch"] for row in parts]
        axis = next(free)
        for i, name in enumerate(("alignment", "contrast", "entropy")):
            axis.plot(
                epochs,
                [row[f"train_{name}"] for row in parts],
                color=COLOURS[2 * i],
                marker=MARKERS[i],
                markevery=max(1, len(epochs) // 8),
                markersize=4,
                label=name,
            )
        axis.set(title="C2BIN: parts of the loss", xlabel="epoch")
        axis.legend(fontsize=8)
        axis = next(free)
        keys = sorted(
            (key for key in parts[0] if key.startswith("train_effective_clusters_")), key=_head
        )
        for i, key in enumerate(keys):
            k = int(key.rsplit("_", 1)[1])
            axis.plot(
                epochs,
                [100 * row[key] / k for row in parts],
                color=COLOURS[2 * i % 10],
                marker=MARKERS[i % 8],
                markevery=max(1, len(epochs) // 8),
                markersize=4,
                label=f"K = {k}",
            )
        axis.set(title="C2BIN: effective clusters", xlabel="epoch", ylabel="% of K, in a batch")
        axis.set_ylim(0, 105)
        axis.legend(fontsize=8)
    for axis in axes.flat:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    for axis in free:
        axis.set_axis_off()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _head(key: str) -> int:
    return int(key.split("_")[3])


def tsne(
    path: Path,
    features: dict[str, npt.NDArray[Any]],
    labels: npt.NDArray[Any],
    classes: list[str],
    seed: int,
) -> None:
    """Draw the t-SNE of each method's normalised test features, side by side, coloured by class."""
    keep = np.arange(len(labels))[:: -(-len(labels) // TSNE_IMAGES)]
    labels = labels[keep]
    figure, axes = plt.subplots(1, len(features), figsize=(3.4 * len(features), 4.3), squeeze=False)
    for axis, (name, rows) in zip(axes.flat, features.items(), strict=True):
        axis.set(title=name)
        embedding(axis, rows[keep], labels, seed)
    figure.subplots_adjust(left=0.01, right=0.99, wspace=0.04)
    class_legend(figure, classes, markers=True, top=0.92)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def embedding(axis: Any, rows: npt.NDArray[Any], labels: npt.NDArray[Any], seed: int) -> None:
    """Draw the t-SNE of normalised features (n, d), coloured by class."""
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    axis.set(xticks=[], yticks=[])
    if np.ptp(rows, axis=0).max() < 1e-6:
        axis.text(0.5, 0.5, "collapsed:\nall features are equal", ha="center", va="center")
        return
    perplexity = min(30.0, (len(rows) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    for label in np.unique(labels).tolist():
        colour, marker = _style(label)
        chosen = points[labels == label]
        axis.scatter(
            chosen[:, 0], chosen[:, 1], s=14, c=colour, marker=marker, alpha=0.8, linewidths=0
        )


def clusters(
    path: Path,
    images: Tensor,
    labels: npt.NDArray[Any],
    classes: list[str],
    assignments: npt.NDArray[Any],
    rows: int = 16,
    columns: int = 12,
    sample: int | None = None,
) -> None:
    """Draw test images of a head's largest clusters, one a row, framed by class.

    They are the surest of the cluster, or a random sample drawn with the seed `sample`.
    """
    chosen = assignments.argmax(axis=1)
    sizes = np.bincount(chosen, minlength=assignments.shape[1])
    largest = [c for c in np.argsort(-sizes, kind="stable")[:rows] if sizes[c]]
    figure, axes = plt.subplots(
        len(largest),
        columns,
        figsize=(0.62 * columns + 2.6, 0.66 * len(largest) + 1.4),
        squeeze=False,
    )
    for line, cluster in zip(axes, largest, strict=True):
        members = np.flatnonzero(chosen == cluster)
        if sample is None:
            members = members[np.argsort(-assignments[members, cluster], kind="stable")]
        else:
            members = np.random.default_rng([sample, int(cluster)]).permutation(members)
        common = np.bincount(labels[members], minlength=len(classes))
        commonest = _short(classes[int(common.argmax())], 14)
        share = f'{100 * common.max() / len(members):.0f} % "{commonest}"'
        images_word = "image" if len(members) == 1 else "images"
        line[0].set_ylabel(
            f"cluster {cluster}: {len(members)} {images_word}\n{share}",
            rotation=0,
            ha="right",
            va="center",
            fontsize=8,
            labelpad=8,
        )
        for column, axis in enumerate(line):
            axis.set(xticks=[], yticks=[])
            if column < len(members):
                member = members[column]
                axis.imshow(images[member].permute(1, 2, 0).numpy(), interpolation="nearest")
                for spine in axis.spines.values():
                    spine.set(color=_style(int(labels[member]))[0], linewidth=3)
            else:
                for spine in axis.spines.values():
                    spine.set_visible(False)
    height = figure.get_size_inches()[1]
    figure.suptitle(
        f"C2BIN, head of {assignments.shape[1]} clusters: the largest on the test images, "
        f"{'surest images first' if sample is None else 'images drawn at random'}",
        fontsize=10,
        y=1 - 0.15 / height,
        va="top",
    )
    figure.subplots_adjust(
        left=2.3 / figure.get_size_inches()[0], right=0.99, wspace=0.12, hspace=0.15
    )
    class_legend(figure, classes, markers=False, top=1 - 0.45 / height)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def class_legend(figure: Any, classes: list[str], markers: bool, top: float) -> None:
    """Put a legend of the classes below everything, in room made for it."""
    handles: list[Any] = []
    for label, name in enumerate(classes[:LEGEND_CLASSES]):
        colour, marker = _style(label)
        text = _short(name)
        if markers:
            handles.append(Line2D([], [], linestyle="", marker=marker, color=colour, label=text))
        else:
            handles.append(Patch(edgecolor=colour, facecolor="none", linewidth=2.5, label=text))
    if len(classes) > LEGEND_CLASSES:
        handles.append(
            Patch(
                facecolor="none",
                edgecolor="none",
                label=f"and {len(classes) - LEGEND_CLASSES} more",
            )
        )
    width, height = figure.get_size_inches()
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(width / (0.085 * longest + 0.55))))
    lines = -(-len(handles) // columns)
    figure.subplots_adjust(top=top, bottom=(0.22 * lines + 0.2) / height)
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
        handletextpad=0.4,
    )
