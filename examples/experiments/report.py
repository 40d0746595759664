"""Tables that read as plain text too, and what has to be known to read them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Sequence
from typing import Any

from experiments.data import Images
from experiments.store import Result

# What older files, in docs/results for one, call the same.
EARLIER = {"clusters_in_use": "in_use", "effective_clusters": "effective"}
ACCURACIES = {"linear probe": "linear", "kNN k=5": "knn5", "kNN k=200": "knn200"}
CLUSTER_COLUMNS = {
    "NMI": ("nmi", ".3f"),
    "ACC": ("acc", ".3f"),
    "purity": ("purity", ".3f"),
    "ARI": ("ari", ".3f"),
    "in use": ("clusters_in_use", ".0f"),
    "effective": ("effective_clusters", ".1f"),
}


def cluster_score(scores: Result, name: str) -> float:
    """Return one score of a clustering, from files of earlier versions too."""
    return float(scores[name if name in scores else EARLIER[name]])


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """Return the mean and, over several seeds, ± the standard deviation."""
    text = format(statistics.fmean(values), form)
    return text if len(values) == 1 else f"{text} ± {format(statistics.stdev(values), form)}"


def over_seeds(seeds: Sequence[int]) -> str:
    """Return in words what the numbers of a table are."""
    listed = ", ".join(map(str, seeds))
    return f"seed {listed}" if len(seeds) == 1 else f"mean ± standard deviation of seeds {listed}"


def table(results: dict[str, list[Result]]) -> str:
    """Return the demo's table.

    Args:
        results: For each method's label its results, one per seed. A method has one line for each
            way its test images were clustered; the first line carries its other scores.
    """
    head = ["method", *ACCURACIES, "clusters by", *CLUSTER_COLUMNS, "s/epoch"]
    rows = []
    for label, runs in results.items():
        for i, first in enumerate(runs[0]["clustering"]):
            accuracies = [
                mean_and_spread([100 * float(run[key]) for run in runs], ".1f")
                for key in ACCURACIES.values()
            ]
            scores = [
                mean_and_spread([cluster_score(run["clustering"][i], key) for run in runs], form)
                for key, form in CLUSTER_COLUMNS.values()
            ]
            timed = i == 0 and "seconds_per_epoch" in runs[0]
            seconds = [run["seconds_per_epoch"] for run in runs] if timed else []
            rows.append(
                [
                    *([label, *accuracies] if i == 0 else [""] * (1 + len(ACCURACIES))),
                    f"{first['by']}, K={first['k']}",
                    *scores,
                    mean_and_spread(seconds, ".1f") if timed else "",
                ]
            )
    return markdown(head, rows, left=(0, head.index("clusters by")))


def markdown(head: list[str], rows: list[list[str]], left: Collection[int] = (0,)) -> str:
    """Return a Markdown table that reads as plain text too; columns `left` are words."""
    widths = [max(len(row[c]) for row in [head, *rows]) for c in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if c in left else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if c in left else "-" * (width - 1) + ":" for c, width in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def notes(
    images: Images, backbone: str, epochs: int, batch_size: int, seeds: list[int]
) -> list[str]:
    """Return what has to be known to read the table, one paragraph each."""
    train, test = len(images.train), len(images.test)
    k = min(200, train)
    cut = "" if k == 200 else f" (cut to {k}: there are no more training images)"
    return [
        f"{images.source}: {train} training and {test} test images of {images.size} × "
        f"{images.size} pixels, {len(images.classes)} classes; backbone {backbone}, {epochs} "
        f"epochs, batch {batch_size}, {over_seeds(seeds)}.",
        *images.notes,
        "Every score is of test images; features are the backbone's, frozen, without augmentation. "
        "Linear probe and kNN in %: the probe's learning rate is chosen on a fifth of the training "
        f"images; kNN is lightly's, cosine, temperature 0.1, k = 5 and k = 200{cut}.",
        "k-means is fitted on L2-normalised training features; own head is the cluster that a "
        "C2BIN head finds most likely. ACC matches clusters one to one with classes, so it is low "
        "by design when K is far above their number; purity lets each cluster stand for its "
        "commonest class, and grows with K: compare both at equal K.",
        "In use: clusters with a test image. Effective: exp of the entropy of the mean assignment, "
        "1 when collapsed and K when balanced, but also K when every image is spread evenly over "
        "all clusters: read the two together.",
        "untrained: the same backbone before any training, the floor.",
    ]


def heads_table(runs: Sequence[Result]) -> list[str]:
    """Return the table of C2BIN's heads, if it ran, of scores by `ClusterMonitor`, one per seed."""
    heads: dict[str, dict[str, list[float]]] = {}
    for name, value in (item for run in runs for item in run.items()):
        if match := re.fullmatch(r"val_(.*)_(\d+)_of_(\d+)", name):
            scores = heads.setdefault(f"{match[2]}, K = {match[3]}", {})
            scores.setdefault(match[1], []).append(value)
    kinds = [key for key, _ in CLUSTER_COLUMNS.values()] + ["agreement"]
    body = [
        [head, *(f"{statistics.fmean(scores[k]):.3g}" if k in scores else "" for k in kinds)]
        for head, scores in sorted(heads.items())
    ]
    head = ["C2BIN's head", *(kind.replace("_", " ") for kind in kinds)]
    return [markdown(head, body)] if heads else []


COLUMNS = {name: ACCURACIES[name] for name in ("kNN k=200", "kNN k=5", "linear probe")}
CLUSTERS = {"NMI": "nmi", "ACC": "acc"}
HEAD = [
    *COLUMNS,
    *(f"{whose} {name}" for whose in ("k-means", "heads'") for name in CLUSTERS),
    "clusters in use",
]
SCORES = (
    "Accuracies in percent, of frozen features on these images; k-means with as many clusters as "
    "classes; the heads' NMI and ACC are means over heads. ACC matches clusters one to one with "
    "classes, so it falls as K grows."
)


def cells(results: Sequence[Result]) -> list[str]:
    """Return a row under `HEAD`: mean ± standard deviation over seeds of every score."""
    row = [mean_and_spread([100 * run[key] for run in results], ".1f") for key in COLUMNS.values()]
    kmeans = [result["clustering"][0] for result in results]
    row += [mean_and_spread([scores[key] for scores in kmeans], ".3f") for key in CLUSTERS.values()]
    heads = [result["clustering"][1:] for result in results]
    if not heads[0]:
        return [*row, *[""] * len(CLUSTERS), ""]
    # Of heads of many sizes, the mean of their scores; and how much of each head is in use.
    row += [
        mean_and_spread([statistics.fmean(head[key] for head in each) for each in heads], ".3f")
        for key in CLUSTERS.values()
    ]
    sizes = [head["k"] for head in heads[0]]
    used = [
        statistics.fmean(cluster_score(each[i], "clusters_in_use") for each in heads)
        for i in range(len(sizes))
    ]
    return [*row, ", ".join(f"{u:.0f} of {k}" for u, k in zip(used, sizes, strict=True))]


def sentence(stated: dict[str, Any], scored: str = "test") -> str:
    """Return what a table was made with, of `Bench.about`; `scored` names the images of scores."""
    counts = stated["images"]
    return (
        f"{stated['source']}: {counts['train']} training and {counts[scored]} {scored} images; "
        f"backbone {stated['backbone']}, batch {stated['batch_size']}, "
        f"{over_seeds(stated['seeds'])}."
    )


def recorded(results: Sequence[Result], seeds: Sequence[int]) -> dict[int, Result]:
    """Return each seed's scores, for the JSON file; the curves stay in the runs' folders."""
    return {
        seed: {name: value for name, value in result.items() if name != "curve"}
        for seed, result in zip(seeds, results, strict=True)
    }
