"""What clusters the same features: scikit-learn's methods, and other losses with C2BIN's heads.

IIC and PICA need of a batch only the sums that C2BIN's losses take, so they are written on these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
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
from torch.nn.functional import cross_entropy, normalize

from c2bin_ext.clustering import C2BINClustering
from c2bin_ext.functional import cluster_entropy_regularizer

Array = npt.NDArray[Any]
Heads = Sequence[Tensor]


class Loss(NamedTuple):
    """What the estimator reads of a criterion's result."""

    loss: Tensor


def iic(assignments: tuple[Heads, Heads]) -> Loss:
    """IIC (Ji et al., ICCV 2019, Eq. 3): minus the mutual information of the views' clusters."""
    losses = []
    for first, second in zip(*assignments, strict=True):
        gram = first.T @ second
        joint = (gram + gram.T) / (2 * gram.sum())
        joint = joint.clamp_min(1e-9)
        independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
        losses.append((joint * (independent.log() - joint.log())).sum())
    return Loss(torch.stack(losses).sum())


def pica(assignments: tuple[Heads, Heads]) -> Loss:
    """PICA (Huang et al., CVPR 2020, Eq. 9): the cosine contrast at τ = 1, balance weighed 2."""
    losses = []
    for views in zip(*assignments, strict=True):
        columns = [normalize(view, dim=0, eps=1e-6) for view in views]
        cosines = columns[0].T @ columns[1]
        own = torch.arange(len(cosines), device=cosines.device)
        balance = sum(map(cluster_entropy_regularizer, views), cosines.new_zeros(())) / 2
        losses.append(cross_entropy(cosines, own) + 2 * balance)
    return Loss(torch.stack(losses).sum())


def scan(assignments: tuple[Heads, Heads]) -> Loss:
    """SCAN (Van Gansbeke et al., ECCV 2020, Eq. 2): pairs alike, and entropy weighed 5."""
    losses = []
    for anchors, neighbours in zip(*assignments, strict=True):
        alike = (anchors * neighbours).sum(dim=1).clamp_min(1e-9).log().mean()
        losses.append(5 * cluster_entropy_regularizer(anchors) - alike)
    return Loss(torch.stack(losses).sum())


def cc(assignments: tuple[Heads, Heads]) -> Loss:
    """CC's cluster-level loss (Li et al., AAAI 2021, Eq. 5-7): NT-Xent of 2K columns at τ = 1."""
    losses = []
    for first, second in zip(*assignments, strict=True):
        columns = normalize(torch.cat([first, second], dim=1), dim=0)
        similarity = columns.T @ columns
        k = first.shape[1]
        rows = torch.arange(2 * k, device=first.device)
        similarity = similarity.masked_fill(rows[:, None] == rows, -torch.inf)
        balance = cluster_entropy_regularizer(first) + cluster_entropy_regularizer(second)
        losses.append(cross_entropy(similarity, rows.roll(k)) + balance)
    return Loss(torch.stack(losses).sum())


LOSSES: dict[str, Callable[[tuple[Heads, Heads]], Loss]] = {
    "IIC": iic,
    "PICA": pica,
    "SCAN": scan,
    "CC": cc,
}


class OtherLoss(C2BINClustering):
    """`C2BINClustering` in everything but its loss."""

    def __init__(self, loss: str = "IIC", **options: Any) -> None:
        # The weight of the balance is in the loss.
        super().__init__(**{"entropy_weight": 1.0, **options})
        self.loss = loss

    def _criterion(self, entropy_weight: float) -> Callable[[Any], Any]:
        return LOSSES[self.loss]


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
