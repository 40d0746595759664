"""Pictures of clusters of features: images of some clusters at three scales, and a t-SNE map.

python -m experiments.features.pictures --images FOLDER --out FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from sklearn.manifold import TSNE
from sklearn.preprocessing import Normalizer, StandardScaler

from c2bin_ext.clustering import C2BINClustering
from experiments.features import images
from experiments.features.extraction import Extractor, plain

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Array = npt.NDArray[Any]
CLUSTERS, SHOWN = 4, 8  # clusters of a scale, and images of each


def grid(pictures: images.Pictures, model: C2BINClustering, features: Array, path: Path) -> None:
    """Draw the surest images of some clusters of every scale, one line a cluster."""
    scales = len(model.labels_per_scale_)
    figure, axes = plt.subplots(
        CLUSTERS, scales, figsize=(3.4 * scales, 0.5 * CLUSTERS + 0.4), squeeze=False
    )
    for scale in range(scales):
        assignments = model.predict_proba(features, scale=scale)
        labels, k = assignments.argmax(axis=1), assignments.shape[1]
        sizes = np.bincount(labels, minlength=k)
        order = np.argsort(-sizes, kind="stable")
        chosen = order[np.linspace(0, max(0, (sizes > 0).sum() - 1), CLUSTERS).astype(int)]
        for line, cluster in enumerate(chosen):
            surest = np.argsort(-assignments[:, cluster], kind="stable")[:SHOWN]
            axis = axes[line][scale]
            axis.imshow(np.hstack([np.asarray(plain(pictures.read(int(i)), 48)) for i in surest]))
            axis.set_axis_off()
        axes[0][scale].set_title(f"{k} clusters", fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def t_sne(features: Array, labels: Array, classes: Array, path: Path) -> None:
    """Draw one map of the features twice: coloured by cluster and by class."""
    scaled = Normalizer().fit_transform(StandardScaler().fit_transform(features))
    places = TSNE(init="pca", random_state=0).fit_transform(scaled)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.3))
    for axis, colours, title in zip(axes, (labels, classes), ("cluster", "class"), strict=True):
        axis.scatter(*places.T, c=colours, cmap="tab20", s=4, linewidths=0)
        axis.set_title(f"coloured by {title}", fontsize=9)
        axis.set_axis_off()
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Cluster the features of some images and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", required=True, help="a folder, an .npz of JPEGs, or digits")
    parser.add_argument("--network", default="efficientnet-lite0")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--limit", type=int, default=3000)
    parser.add_argument("--clusters", type=int, nargs="+", default=[10, 40, 160])
    parser.add_argument("--cache", type=Path, default=Path("build/features"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    args = parser.parse_args(arguments)
    pictures = images.load(args.images)
    order = np.random.default_rng(0).permutation(len(pictures))
    pictures = pictures.some(order[: args.limit])
    extractor = Extractor(args.network, args.size, args.cache / "extracted")
    features, views = extractor.features(pictures, args.views)
    model = C2BINClustering(args.clusters, random_state=0, verbose=True)
    model.fit(features, views=views)
    args.out.mkdir(parents=True, exist_ok=True)
    grid(pictures, model, features, args.out / "features-clusters.png")
    t_sne(
        features.astype(np.float32), model.labels_, pictures.labels, args.out / "features-tsne.png"
    )


if __name__ == "__main__":
    main()
