"""What the page and the tables show: neighbours, a map, clusters, and the tables themselves."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from c2bin_explore.images import Array, Images, Tell, classes_of, shown
from c2bin_ext import metrics
from c2bin_ext.clustering import C2BINClustering, _largest_products

NEIGHBOURS = 12
# A spreadsheet reads a text that begins so as a formula; "'" before it says that it is text.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
_BLOCK = 1024
_MAP_COMPONENTS = 50
_MAP_SAMPLE = 5000
_MAP_ANCHORS = 4


@dataclass(frozen=True)
class Clusters:
    """One scale: each image's cluster (n,), the assignment to it (n,), and scores of the whole."""

    count: int
    cluster: npt.NDArray[np.int64]
    certainty: npt.NDArray[np.float32]
    scores: dict[str, float]


@dataclass(frozen=True)
class Result:
    """All there is to know about n images, in one order.

    Attributes:
        names: Paths relative to the folder, as text.
        labels: Class of each image (n,), -1 where there is none.
        classes: Class names, empty without classes.
        scales: Coarse to fine.
        neighbours: Indices of the nearest images, nearest first, (n, k).
        cosines: Their cosine similarities (n, k).
        positions: The map, (n, 2), in [0, 1].
        map_method: How the map was made, a sentence.
    """

    names: list[str]
    labels: npt.NDArray[np.int64]
    classes: list[str]
    scales: list[Clusters]
    neighbours: npt.NDArray[np.int64]
    cosines: npt.NDArray[np.float32]
    positions: npt.NDArray[np.float32]
    map_method: str


def analyse(
    images: Images,
    features: Array,
    clustering: C2BINClustering,
    labels: str,
    seed: int,
    phase: Callable[[str], Tell],
) -> Result:
    """Return everything the page shows of images and their features (n, d).

    Args:
        images: What was read.
        features: One row an image.
        clustering: Fitted, on these or on others.
        labels: See `classes_of`.
        seed: Of the map.
        phase: Takes the name of a phase that begins, and returns what to tell its progress.
    """
    classes, numbers = classes_of(images.paths, labels)
    # As they are clustered: all features of a network share a direction, which tells nothing apart.
    rows = clustering._projected(features, "features")
    with torch.inference_mode():
        parts = [clustering.head_(part.double()) for part in torch.split(rows, _BLOCK)]
    scales = [_scale(torch.cat(scale), numbers) for scale in zip(*parts, strict=True)]
    indices, cosines = nearest(rows, NEIGHBOURS, phase("Neighbours"))
    phase("Map")
    positions, method = layout(rows, seed)
    return Result(
        names=[shown(path) for path in images.paths],
        labels=numbers,
        classes=[shown(name) for name in classes],
        scales=scales,
        neighbours=indices.numpy(),
        cosines=cosines.numpy(),
        positions=positions,
        map_method=method,
    )


def _scale(assignments: Tensor, labels: npt.NDArray[np.int64]) -> Clusters:
    certainty, cluster = assignments.max(dim=1)
    scores = {
        "in_use": float(metrics.clusters_in_use(cluster)),
        "effective": metrics.effective_clusters(assignments),
    }
    if (labels >= 0).any():
        scores["nmi"] = metrics.normalized_mutual_information(labels, cluster)
        scores["acc"] = metrics.clustering_accuracy(labels, cluster)
        scores["purity"] = metrics.purity(labels, cluster)
    return Clusters(assignments.shape[1], cluster.numpy(), certainty.float().numpy(), scores)


def nearest(
    features: Tensor, k: int, tell: Tell = lambda done, total: None
) -> tuple[Tensor, Tensor]:
    """Return the k nearest other rows of each row by cosine similarity, a block at a time.

    Args:
        features: (n, d).
        k: Neighbours; n - 1 if that is less.
        tell: Is told of progress.

    Returns:
        Indices int64 and cosines float32, (n, k), nearest first.

    Examples:
        >>> nearest(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), k=1)[0].tolist()
        [[1], [0], [1]]
    """
    unit = normalize(features.float(), dim=1)
    tell(0, len(unit))
    cosines, indices = _largest_products(unit, min(k, len(unit) - 1), tell)
    # A sum of squares in float32 may end a little above 1.
    return indices, cosines.clamp(-1, 1)


def layout(features: Tensor, seed: int) -> tuple[npt.NDArray[np.float32], str]:
    """Return positions (n, 2) in [0, 1] that keep similar features together, and the method.

    t-SNE of up to 50 principal components of the unit features. Beyond 5,000 images t-SNE places a
    random 5,000 of them, and each other image lies at the mean of its 4 nearest among these. Up to
    8 images: the first two principal components.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n = len(features)
    unit = normalize(features.float(), dim=1).numpy()
    sample = np.arange(n)
    if n > _MAP_SAMPLE:
        sample = np.sort(np.random.default_rng(seed).choice(n, _MAP_SAMPLE, replace=False))
    # Not from a solver that draws at random: the same features give the same map.
    components = min(_MAP_COMPONENTS if n > 8 else 2, len(sample), unit.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):  # identical images have no variance
        reduced = PCA(components, svd_solver="full").fit(unit[sample]).transform(unit)
    if n <= 8:
        points = np.zeros((n, 2))
        points[:, : reduced.shape[1]] = reduced
        return _unit_square(points), "the first two principal components"
    start = reduced[sample, :2] if components > 1 else np.repeat(reduced[sample], 2, axis=1)
    spread = float(start[:, 0].std())
    tsne = TSNE(
        perplexity=min(30.0, (len(sample) - 1) / 3),
        init=(start * (1e-4 / spread if spread > 0 else 0.0)).astype(np.float32),
        learning_rate="auto",
        random_state=seed,
    )
    placed = tsne.fit_transform(reduced[sample].astype(np.float32))
    method = f"t-SNE of the first {components} principal components of the unit features"
    if n == len(sample):
        return _unit_square(placed), method
    points = np.empty((n, 2))
    anchors = torch.from_numpy(reduced[sample])
    for begin in range(0, n, _BLOCK):
        rows = torch.from_numpy(reduced[begin : begin + _BLOCK])
        close = torch.cdist(rows, anchors).topk(_MAP_ANCHORS, largest=False).indices
        points[begin : begin + _BLOCK] = placed[close.numpy()].mean(axis=1)
    points[sample] = placed
    return _unit_square(points), (
        f"{method}, for {len(sample):,} images drawn at random; each other image lies at the mean "
        f"of its {_MAP_ANCHORS} nearest among them"
    )


def _unit_square(points: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    low, extent = points.min(axis=0), float(np.ptp(points, axis=0).max())
    centred = (points - low - np.ptp(points, axis=0) / 2) / (extent if extent > 0 else 1)
    return np.asarray(np.clip(centred + 0.5, 0, 1), dtype=np.float32)


Rows = Callable[[], Iterator[tuple[Any, ...]]]


def tables(result: Result) -> dict[str, tuple[list[str], Rows]]:
    """Return the tables by file name without suffix: the columns, and a function of the rows."""
    names = result.names

    def assignments() -> Iterator[tuple[Any, ...]]:
        for i, name in enumerate(names):
            label = result.classes[result.labels[i]] if result.labels[i] >= 0 else None
            pairs = [(int(s.cluster[i]), float(s.certainty[i])) for s in result.scales]
            x, y = result.positions[i].tolist()
            yield (name, label, *(value for pair in pairs for value in pair), x, y)

    def neighbours() -> Iterator[tuple[Any, ...]]:
        pairs = zip(result.neighbours.tolist(), result.cosines.tolist(), strict=True)
        for name, (others, cosines) in zip(names, pairs, strict=True):
            for rank, (other, cosine) in enumerate(zip(others, cosines, strict=True), 1):
                yield (name, rank, names[other], cosine)

    columns = [f"{what}_{s.count}" for s in result.scales for what in ("cluster", "certainty")]
    return {
        "assignments": (["file", "label", *columns, "map_x", "map_y"], assignments),
        "neighbours": (["file", "rank", "neighbour", "cosine"], neighbours),
    }


def has_parquet() -> bool:
    """Say whether pyarrow is installed."""
    return importlib.util.find_spec("pyarrow") is not None


def write_csv(path: Path, columns: Sequence[str], rows: Rows) -> None:
    """Write a table as CSV in UTF-8, which `read_csv` reads again."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        for row in rows():
            writer.writerow([_as_text(cell) if isinstance(cell, str) else cell for cell in row])


def _as_text(cell: str) -> str:
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table that `write_csv` or the page wrote."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return [
            {name: (cell or "").removeprefix("'") for name, cell in row.items() if name}
            for row in csv.DictReader(stream)
        ]


def write_parquet(path: Path, columns: Sequence[str], rows: Rows) -> None:
    """Write a table as Parquet; needs pyarrow."""
    import pyarrow
    import pyarrow.parquet

    values = list(zip(*rows(), strict=True))
    table = pyarrow.table({name: list(v) for name, v in zip(columns, values, strict=True)})
    pyarrow.parquet.write_table(table, path)
