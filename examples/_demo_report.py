"""The demo's one table, the notes that go with it, and what the numbers were made with."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lightly
import numpy as np
import pytorch_lightning
import sklearn
import torch
import torchvision
from _demo_data import Images

import c2bin_ext

Result = dict[str, Any]


def mean_and_spread(values: list[float], form: str) -> str:
    """Return the mean and, over several seeds, ± the standard deviation."""
    text = format(statistics.fmean(values), form)
    return text if len(values) == 1 else f"{text} ± {format(statistics.stdev(values), form)}"


def percent(key: str) -> Callable[[Result], float]:
    """Return a reader of one accuracy, in percent."""
    return lambda run: 100 * float(run[key])


METHOD_COLUMNS: dict[str, tuple[Callable[[Result], float], str]] = {
    "linear probe": (percent("linear"), ".1f"),
    "kNN k=5": (percent("knn5"), ".1f"),
    "kNN k=200": (percent("knn200"), ".1f"),
}
CLUSTER_COLUMNS = {
    "NMI": ("nmi", ".3f"),
    "ACC": ("acc", ".3f"),
    "purity": ("purity", ".3f"),
    "ARI": ("ari", ".3f"),
    "in use": ("in_use", ".0f"),
    "effective": ("effective", ".1f"),
}


def table(results: dict[str, list[Result]]) -> str:
    """Return Markdown that reads as plain text too.

    Args:
        results: For each method's label its results, one per seed. A method has one line for each
            way its test images were clustered; the first line carries its other scores.
    """
    head = ["method", *METHOD_COLUMNS, "clusters by", *CLUSTER_COLUMNS, "s/epoch"]
    rows = []
    for label, runs in results.items():
        for i, first in enumerate(runs[0]["clustering"]):
            parts = [run["clustering"][i] for run in runs]
            row = [""] * (1 + len(METHOD_COLUMNS))
            if i == 0:
                row = [label]
                for read, form in METHOD_COLUMNS.values():
                    row.append(mean_and_spread([read(run) for run in runs], form))
            row.append(f"{first['by']}, K={first['k']}")
            for key, form in CLUSTER_COLUMNS.values():
                row.append(mean_and_spread([part[key] for part in parts], form))
            timed = i == 0 and "seconds_per_epoch" in runs[0]
            seconds = [run["seconds_per_epoch"] for run in runs] if timed else []
            row.append(mean_and_spread(seconds, ".1f") if timed else "")
            rows.append(row)
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
    runs = f"seed {seeds[0]}"
    if len(seeds) > 1:
        runs = f"mean ± standard deviation of seeds {', '.join(map(str, seeds))}"
    return [
        f"{images.source}: {train} training and {test} test images of {images.size} × "
        f"{images.size} pixels, {len(images.classes)} classes; backbone {backbone}, {epochs} "
        f"epochs, batch {batch_size}, {runs}.",
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


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    modules = (c2bin_ext, lightly, np, pytorch_lightning, sklearn, torch, torchvision)
    return {"python": platform.python_version()} | {m.__name__: str(m.__version__) for m in modules}


def hardware() -> dict[str, Any]:
    """Return what the times were taken on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next((text.split(":", 1)[1].strip() for text in lines if "model name" in text), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
