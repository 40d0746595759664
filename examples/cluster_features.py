"""Cluster your own features at several scales; pip install "c2bin-ext[eval]".

    python examples/cluster_features.py FEATURES.npy [--views VIEWS.npy] [--clusters 10 40 160]

FEATURES.npy is an array (n, d) of any network's features, VIEWS.npy (v, n, d) those of augmented
views of the same images, if you have them. Without a file: scikit-learn's digits, as a trial.
"""

import argparse
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from c2bin_ext.clustering import C2BINClustering
from c2bin_ext.metrics import clustering_accuracy

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("features", nargs="?", help="an .npy of shape (n, d)")
parser.add_argument("--views", help="an .npy of shape (v, n, d)")
parser.add_argument("--clusters", type=int, nargs="+", default=[10, 40, 160])
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--out", help="an .npz for the clusters of every scale")
args = parser.parse_args()

features = np.load(args.features, mmap_mode="r") if args.features else load_digits().data
views = np.load(args.views, mmap_mode="r") if args.views else None
model = C2BINClustering(args.clusters, max_epochs=args.epochs, random_state=0, verbose=True)
model.fit(features, views=views)
for k, labels in zip(args.clusters, model.labels_per_scale_, strict=True):
    sizes = np.bincount(labels, minlength=k)
    print(f"{k} clusters: {np.count_nonzero(sizes)} in use, {sizes.min()} to {sizes.max()} rows")
if not args.features:
    accuracy = clustering_accuracy(load_digits().target, model.labels_)
    print(f"digits: the first scale agrees with {100 * accuracy:.0f} % of the labels")
if args.out:
    clusters: dict[str, Any] = {f"clusters_{i}": k for i, k in enumerate(model.labels_per_scale_)}
    np.savez(args.out, **clusters)
