"""What `C2BINClustering` says without labels, beside what the labels say, on several sets.

Two questions: does the agreement of neighbours tell how many clusters there are, and does it tell
whether training has bettered k-means?
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn import datasets
from sklearn.metrics import silhouette_score
from tqdm import tqdm

from c2bin_ext import metrics
from c2bin_ext.clustering import C2BINClustering
from experiments.features.rivals import BEST, classical

Array = npt.NDArray[Any]
SCALES = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30)
NEAR = 0.97  # of the highest agreement is as good
ROWS_A_CLUSTER = 10  # fewer, and there is nothing to tell clusters by
BEST_K_MEANS = f"k-means, {BEST}"
COLUMNS = ("k-means", "λ_ent 1", '"auto"')


def sets() -> dict[str, tuple[Array, Array]]:
    """Return sets of scikit-learn, as they are and with classes of unequal size."""
    found = {
        "digits": datasets.load_digits(return_X_y=True),
        "breast cancer": datasets.load_breast_cancer(return_X_y=True),
        "wine": datasets.load_wine(return_X_y=True),
        "iris": datasets.load_iris(return_X_y=True),
        "six blobs": datasets.make_blobs([250] * 6, 20, cluster_std=6, random_state=0)[:2],
        "unequal blobs": datasets.make_blobs(
            [1000, 100, 50, 20], 20, cluster_std=5, random_state=0
        )[:2],
    }
    found["unequal digits"] = uneven(*found["digits"])
    return found


def uneven(features: Array, labels: Array, ratio: float = 0.75) -> tuple[Array, Array]:
    """Keep of each class a share that falls by `ratio` from one to the next."""
    source = np.random.default_rng(0)
    kept = []
    for place, label in enumerate(np.unique(labels)):
        own = source.permutation(np.flatnonzero(labels == label))
        kept.append(own[: max(ROWS_A_CLUSTER, round(len(own) * ratio**place))])
    rows = np.sort(np.concatenate(kept))
    return features[rows], labels[rows]


def scales(features: Array, labels: Array, seed: int, device: str) -> dict[str, Any]:
    """Return agreement, silhouette of k-means and NMI at every scale."""
    ks = [k for k in SCALES if k * ROWS_A_CLUSTER <= len(features)]
    model = C2BINClustering(ks, random_state=seed, device=device).fit(features)
    result: dict[str, Any] = {"k": ks, "agreement": model.agreement_per_scale_}
    own = model.labels_per_scale_
    result["NMI"] = [metrics.normalized_mutual_information(labels, found) for found in own]
    result["silhouette"] = []
    for k in ks:
        k_means = classical(BEST_K_MEANS, k, features.shape[1], seed).fit(features)
        scaled = k_means[:-1].transform(features)
        sampled = min(len(scaled), 5000)
        result["silhouette"].append(
            float(
                silhouette_score(scaled, k_means[-1].labels_, sample_size=sampled, random_state=0)
            )
        )
    return result


def weights(features: Array, labels: Array, seed: int, device: str) -> dict[str, Any]:
    """Return the NMI of k-means, of λ_ent = 1 and of the choice without labels."""
    k = len(np.unique(labels))
    options: dict[str, Any] = {"random_state": seed, "device": device}
    chosen = C2BINClustering((k, 2 * k, 4 * k), **options).fit(features)
    fixed = chosen
    if chosen.entropy_weight_ != 1:
        fixed = C2BINClustering((k, 2 * k, 4 * k), entropy_weight=1, **options)
        fixed.fit(features)
    k_means = classical(BEST_K_MEANS, k, features.shape[1], seed).fit(features)
    found = k_means.predict(features), fixed.labels_, chosen.labels_
    score = metrics.normalized_mutual_information
    result: dict[str, Any] = {
        name: score(labels, own) for name, own in zip(COLUMNS, found, strict=True)
    }
    return {**result, "chosen": chosen.entropy_weight_}


def run(
    given: dict[str, tuple[Array, Array]], seeds: Sequence[int], device: str
) -> dict[str, dict[str, list[Any]]]:
    """Return the results of every set and seed."""
    results: dict[str, dict[str, list[Any]]] = {}
    plan = [(name, seed) for name in given for seed in seeds]
    for name, seed in (bar := tqdm(plan, unit="run")):
        bar.set_postfix_str(f"{name}, seed {seed}")
        own = results.setdefault(name, {"scales": [], "weights": []})
        own["scales"].append(scales(*given[name], seed, device))
        own["weights"].append(weights(*given[name], seed, device))
    return results


def picked(found: dict[str, Any], by: str) -> int:
    """Return the K of the highest value; by agreement, the finest that is as good as the highest.

    Coarse scales that put whole classes together agree as much as the true one does.
    """
    least = max(found[by]) * (NEAR if by == "agreement" else 1)
    return max(int(k) for k, value in zip(found["k"], found[by], strict=True) if value >= least)


def table(results: dict[str, Any], given: dict[str, tuple[Array, Array]]) -> str:
    """Return both tables as Markdown."""
    first = [
        "| set | rows | classes | K by agreement | K by silhouette of k-means | K of best NMI |"
    ]
    first.append("| --- |" + " ---: |" * 5)
    second = [f"| set | {' | '.join(COLUMNS)} | chosen |", "| --- |" + " ---: |" * 4]
    for name, own in results.items():
        features, labels = given[name]
        ks = [
            ", ".join(str(picked(found, by)) for found in own["scales"])
            for by in ("agreement", "silhouette", "NMI")
        ]
        size = f"{len(features)} | {len(np.unique(labels))}"
        first.append(f"| {name} | {size} | {' | '.join(ks)} |")
        cells = [f"{statistics.fmean(run[c] for run in own['weights']):.3f}" for c in COLUMNS]
        chosen = [run["chosen"] for run in own["weights"]]
        words = ", ".join("k-means" if weight is None else f"{weight:g}" for weight in chosen)
        second.append(f"| {name} | {' | '.join(cells)} | {words} |")
    return "\n".join([*first, "", *second])
