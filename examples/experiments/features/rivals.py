"""What clusters the same features: scikit-learn's methods, and other losses with C2BIN's heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.cluster import (
    HDBSCAN,
    AgglomerativeClustering,
    KMeans,
    MiniBatchKMeans,
    SpectralClustering,
)
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from torch import Tensor

from c2bin_ext.clustering import C2BINClustering
from experiments.cluster_losses import LOSSES

Array = npt.NDArray[Any]


class Loss(NamedTuple):
    """What the estimator reads of a criterion's result."""

    loss: Tensor


class OtherLoss(C2BINClustering):
    """`C2BINClustering` in everything but its loss."""

    def __init__(self, loss: str = "IIC", **options: Any) -> None:
        # The weight of the balance is in the loss.
        super().__init__(**{"entropy_weight": 1.0, **options})
        self.loss = loss

    def _criterion(self, entropy_weight: float) -> Callable[[Any], Any]:
        return lambda assignments: Loss(LOSSES[self.loss](assignments))


def _floats(rows: Array) -> Array:
    return rows.astype(np.float32)


SCALINGS: dict[str, list[Any]] = {
    "raw": [],
    "L2": [Normalizer()],
    "standardised": [StandardScaler()],
    "standardised, L2": [StandardScaler(), Normalizer()],
    "standardised, PCA 256, L2": [StandardScaler(), PCA(256, random_state=0), Normalizer()],
}


class _Labels:
    """A method without `predict`: other rows get the cluster most of their 10 neighbours have."""

    def __init__(self, method: Any, scaling: list[Any]) -> None:
        self.method, self.scaling = method, make_pipeline(*scaling)

    def fit(self, rows: Array) -> _Labels:
        scaled = self.scaling.fit_transform(rows)
        labels = self.method.fit_predict(scaled)
        kept = labels >= 0  # HDBSCAN's noise is no cluster
        if not kept.any():
            labels, kept = np.zeros_like(labels), ~kept
        neighbours = min(10, int(kept.sum()))
        self.vote = KNeighborsClassifier(neighbours).fit(scaled[kept], labels[kept])
        return self

    def predict(self, rows: Array) -> Array:
        labels: Array = self.vote.predict(self.scaling.transform(rows))
        return labels


def _scaled(scaling: str, d: int) -> list[Any]:
    steps = [FunctionTransformer(_floats), *SCALINGS[scaling]]
    return [step for step in steps if not isinstance(step, PCA) or d > step.n_components]


BEST = "standardised, PCA 256, L2"
CLASSICAL = (
    *(f"k-means, {scaling}" for scaling in SCALINGS),
    "mini-batch k-means",
    "Gaussian mixture",
    "spectral",
    "agglomerative",
    "HDBSCAN",
)


def classical(name: str, k: int, d: int, seed: int) -> Any:
    """Return a method of scikit-learn, with `fit` and `predict`, its rows scaled first."""
    if name.startswith("k-means, "):
        steps = _scaled(name.removeprefix("k-means, "), d)
        return make_pipeline(*steps, KMeans(k, n_init=10, random_state=seed))
    steps = _scaled(BEST, d)
    if name == "mini-batch k-means":
        method = MiniBatchKMeans(k, n_init=10, random_state=seed, batch_size=1024)
        return make_pipeline(*steps, method)
    if name == "Gaussian mixture":
        few = [PCA(min(64, d), random_state=0)]
        method = GaussianMixture(k, n_init=3, reg_covar=1e-4, random_state=seed)
        return make_pipeline(*steps, *few, method)
    if name == "spectral":
        method = SpectralClustering(
            k, affinity="nearest_neighbors", n_neighbors=20, random_state=seed
        )
        return _Labels(method, steps)
    if name == "agglomerative":
        return _Labels(AgglomerativeClustering(k), steps)
    if name == "HDBSCAN":
        few = [PCA(min(20, d), random_state=0)]
        return _Labels(HDBSCAN(min_cluster_size=15, copy=True), [*steps, *few])
    raise ValueError(f"method: expected one of {CLASSICAL}, got {name!r}")
