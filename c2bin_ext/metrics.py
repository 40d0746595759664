"""Scores for clusters and for frozen features, as numbers to report rather than losses to train.

Needs the extra `eval` (scikit-learn, scipy): `pip install "c2bin-ext[eval]"`. `import
c2bin_ext` alone never imports this module.

Conventions shared by every score that takes labels:

* Labels and clusters are 1-D sequences of integers, numpy arrays or torch tensors on any device.
  Their values are names: only which items share a value matters, gaps in the numbering do not.
* A label below zero marks an unlabelled item. It is left out of the score, together with its
  cluster or feature; if every item is unlabelled there is nothing to score: `ValueError`.
* Features are compared by cosine similarity, in float64 whatever their dtype, and similarities that
  agree to ten decimals are ties. Ties never depend on the order of the items. The cosine of a zero
  vector with anything is 0. Memory is a float64 copy of the features plus a bounded block of the
  similarity matrix; the whole matrix is never held.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, Union

import torch
from torch import Tensor

try:
    import numpy as np
    import numpy.typing as npt
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
except ImportError as error:
    raise ImportError(
        f'c2bin_ext.metrics needs scikit-learn and scipy ({error}): pip install "c2bin-ext[eval]"'
    ) from error

from c2bin_ext._checks import TOLERANCE

__all__ = [
    "adjusted_rand_index",
    "agreement",
    "clustering_accuracy",
    "clusters_in_use",
    "effective_clusters",
    "knn_accuracy",
    "mean_average_precision",
    "normalized_mutual_information",
    "purity",
    "retrieval_precision",
]

# Union, because the right-hand side of an alias is evaluated: Python 3.10 must be able to run it.
Integers: TypeAlias = Union[Sequence[int], "npt.NDArray[np.integer[Any]]", Tensor]
Features: TypeAlias = Union["npt.NDArray[np.floating[Any]]", Tensor]

# 2**22 float64 similarities are 32 MiB; ranking a block takes a handful of copies of it.
_BLOCK_ELEMENTS = 2**22

# Float64 dot products of equal vectors differ in the last bits with their place in the matrix
# (blocked kernels). Rounding makes them equal, so that ties are ties on every device.
_DECIMALS = 10


def normalized_mutual_information(labels: Integers, clusters: Integers) -> float:
    """Mutual information of labels and clusters, divided by the mean of their entropies.

    Formula: `NMI(Y, C) = 2 I(Y; C) / (H(Y) + H(C))`.

    Arithmetic-mean normalisation (scikit-learn's default). One class and one cluster: 1. One class
    or one cluster, and several of the other: 0. A single item: 1.

    Args:
        labels: Shape (n,), integers: the class of each item, below zero if unlabelled (left out).
        clusters: Shape (n,), integers >= 0: the cluster of each item.

    Returns:
        A float in [0, 1]; 1 if and only if clusters and classes are the same partition.

    Raises:
        TypeError: An argument does not hold integers.
        ValueError: An argument is empty or not 1-D, the lengths differ, a cluster is negative, or
            no item is labelled.

    Examples:
        >>> normalized_mutual_information([0, 0, 1, 1], [5, 5, 2, 2])
        1.0
        >>> round(normalized_mutual_information([0, 0, 1, 1], [0, 0, 1, 2]), 4)
        0.8

    Source:
        Strehl and Ghosh, "Cluster Ensembles", JMLR 3 (2002); arithmetic mean: Vinh, Epps and
        Bailey, "Information Theoretic Measures for Clusterings Comparison", JMLR 11 (2010).
        Reported in Tables 3 and 11 of the C2BIN paper.
    """
    value = _quietly(normalized_mutual_info_score, *_labelled(labels, clusters))
    # Rounding in the entropies leaves the interval by an ulp.
    return min(1.0, max(0.0, value))


def adjusted_rand_index(labels: Integers, clusters: Integers) -> float:
    """Share of item pairs on which labels and clusters agree, corrected for chance.

    Formula: `ARI = (Σ_ij C(n_ij, 2) − E) / ((A + B) / 2 − E)` with `A = Σ_i C(a_i, 2)`,
    `B = Σ_j C(b_j, 2)` and `E = A B / C(n, 2)`, where `n_ij` counts the items of class i in cluster
    j, `a_i` and `b_j` are its row and column sums, and `C(m, 2) = m (m − 1) / 2`.

    Equal partitions, 0/0 included (one class and one cluster, or all items apart in
    both): 1. One class or one cluster, and several of the other: 0. A single item: 1.

    Args:
        labels: Shape (n,), integers: the class of each item, below zero if unlabelled (left out).
        clusters: Shape (n,), integers >= 0: the cluster of each item.

    Returns:
        A float in [-0.5, 1]: 1 for equal partitions, 0 on average for random ones.

    Raises:
        TypeError: An argument does not hold integers.
        ValueError: An argument is empty or not 1-D, the lengths differ, a cluster is negative, or
            no item is labelled.

    Examples:
        >>> adjusted_rand_index([0, 0, 1, 1], [5, 5, 2, 2])
        1.0
        >>> round(adjusted_rand_index([0, 0, 1, 1], [0, 0, 1, 2]), 4)
        0.5714

    Source:
        Hubert and Arabie, "Comparing Partitions", Journal of Classification 2 (1985). Reported in
        Tables 3 and 11 of the C2BIN paper.
    """
    return _quietly(adjusted_rand_score, *_labelled(labels, clusters))


def clustering_accuracy(labels: Integers, clusters: Integers) -> float:
    """Accuracy under the best one-to-one matching of clusters to classes (Hungarian method).

    Formula: `ACC = max_m (1/n) Σ_i 1[m(c_i) = y_i]` over the one-to-one maps m of clusters to
    classes.

    With more clusters than classes the
    surplus clusters match nothing and their items count as wrong; with fewer, the surplus classes
    do. This is the ACC of the clustering literature; the one the C2BIN paper describes in words is
    `purity`, which is never smaller. One cluster: the share of the largest class. One class:
    the share of the largest cluster. A single item: 1.

    Args:
        labels: Shape (n,), integers: the class of each item, below zero if unlabelled (left out).
        clusters: Shape (n,), integers >= 0: the cluster of each item.

    Returns:
        A float in (0, 1].

    Raises:
        TypeError: An argument does not hold integers.
        ValueError: An argument is empty or not 1-D, the lengths differ, a cluster is negative, or
            no item is labelled.

    Examples:
        >>> clustering_accuracy([0, 0, 1, 1], [5, 5, 2, 2])
        1.0
        >>> clustering_accuracy([0, 0, 1, 1], [0, 0, 1, 2])
        0.75

    Source:
        Kuhn, "The Hungarian Method for the Assignment Problem" (1955); as a clustering score: Yang
        et al., "Image Clustering Using Local Discriminant Models and Global Integration", IEEE TIP
        19 (2010).
    """
    rows, columns, counts = _contingency(*_labelled(labels, clusters))
    # Every class may also match nothing, a column of its own: so a full matching exists, and the
    # cheapest one, at a cost of `most` less the items, has the most items. No cost is 0, which
    # would be no entry.
    most, classes = counts.max() + 1, np.arange(rows.max() + 1)
    costs = np.concatenate([most - counts, np.full(classes.size, most)])
    places = np.concatenate([rows, classes]), np.concatenate([columns, columns.max() + 1 + classes])
    table = coo_array((costs.astype(np.float64), places)).tocsr()
    matched = table[min_weight_full_bipartite_matching(table)]
    return float((most * classes.size - matched.sum()) / counts.sum())


def purity(labels: Integers, clusters: Integers) -> float:
    """Accuracy when every cluster stands for its dominant class (the C2BIN paper's "ACC").

    Formula: `purity = (1/n) Σ_k max_y |{i : c_i = k, y_i = y}|`.

    Several clusters may stand for one class, so purity grows with the number of clusters and is 1
    for one item per cluster: compare it at equal K only. Never below `clustering_accuracy`.
    One cluster: the share of the largest class. One class: 1. A single item: 1.

    Args:
        labels: Shape (n,), integers: the class of each item, below zero if unlabelled (left out).
        clusters: Shape (n,), integers >= 0: the cluster of each item.

    Returns:
        A float in (0, 1].

    Raises:
        TypeError: An argument does not hold integers.
        ValueError: An argument is empty or not 1-D, the lengths differ, a cluster is negative, or
            no item is labelled.

    Examples:
        >>> purity([0, 0, 1, 1], [0, 0, 1, 2])
        1.0
        >>> purity([0, 0, 1, 1], [3, 3, 3, 3])
        0.5

    Source:
        C2BIN paper, Section 4.3 ("assigning dominant class labels to each cluster"); Manning,
        Raghavan and Schütze, "Introduction to Information Retrieval" (2008), Section 16.3.
    """
    _, columns, counts = _contingency(*_labelled(labels, clusters))
    dominant = np.zeros(columns.max() + 1, dtype=np.int64)
    np.maximum.at(dominant, columns, counts)
    return float(dominant.sum() / counts.sum())


def clusters_in_use(clusters: Integers) -> int:
    """Count the clusters that hold at least one item.

    Formula: `|{c_i : i = 1 … n}|`.

    A collapse shows here late: a cluster with one stray item counts like any other. Read it beside
    `effective_clusters`.

    Args:
        clusters: Shape (n,), integers >= 0: the cluster of each item.

    Returns:
        An int in [1, n].

    Raises:
        TypeError: `clusters` does not hold integers.
        ValueError: `clusters` is empty, not 1-D, or has a negative entry.

    Examples:
        >>> clusters_in_use([0, 7, 7, 0])
        2

    Source:
        Column "clusters in use" of this library's tables; not in the C2BIN paper.
    """
    return int(np.unique(_cluster_indices(clusters)).size)


def effective_clusters(assignments: Tensor) -> float:
    """Count the equally large clusters that have the entropy of the mean assignment.

    Formula: `exp H(ŝ)` with `ŝ_k = (1/n) Σ_i P[i, k]` and `H(ŝ) = −Σ_k ŝ_k log ŝ_k`.

    K when the clusters are balanced, 1 when all mass is in one (and always 1 for K = 1); an empty
    cluster adds nothing. Computed in float64. The entropy regularizer of Eq. 5 is `log K` minus
    the log of this number.

    Args:
        assignments: Shape (n, K), floating point: rows are probabilities (after the softmax).

    Returns:
        A float in [1, K].

    Raises:
        TypeError: `assignments` is not a floating point torch tensor.
        ValueError: `assignments` is not 2-D, is empty, has a negative or non-finite entry, or has
            a row that does not sum to 1 (logits, most likely).

    Examples:
        >>> round(effective_clusters(torch.eye(4)), 4)
        4.0
        >>> round(effective_clusters(torch.tensor([[0.9, 0.1], [0.9, 0.1]])), 4)
        1.3841

    Source:
        C2BIN paper, Eq. 5 (the entropy); its exponential: Hill, "Diversity and Evenness", Ecology
        54 (1973), order 1.
    """
    values = _scores("assignments", assignments)
    if bool((values < 0).any()):
        raise ValueError(
            "assignments: expected probabilities, entries >= 0, got a smallest entry of "
            f"{float(values.min()):g}; apply the softmax first"
        )
    sums = values.sum(dim=1)
    worst = float(sums[(sums - 1).abs().argmax()])
    if abs(worst - 1) > TOLERANCE:
        raise ValueError(
            "assignments: expected probabilities, rows that sum to 1, got a row that sums to "
            f"{worst:g}; apply the softmax first"
        )
    mass = values.sum(dim=0)
    entropy = torch.special.entr(mass / mass.sum()).sum()
    return min(float(values.shape[1]), float(entropy.exp()))


def agreement(assignments0: Tensor, assignments1: Tensor) -> float:
    """Share of instances whose most probable cluster is the same in both views.

    Formula: `(1/n) Σ_i 1[argmax_k P'[i, k] = argmax_k P''[i, k]]`.

    1 for a collapsed head too: read it beside `effective_clusters`. Equal entries: the lowest
    cluster index wins. Logits give the same value as their softmax. K = 1: always 1.

    Args:
        assignments0: Shape (n, K), floating point: view 0.
        assignments1: Shape (n, K), floating point: view 1, same instances in the same order.

    Returns:
        A float in [0, 1].

    Raises:
        TypeError: An argument is not a floating point torch tensor.
        ValueError: An argument is not 2-D, is empty or has a non-finite entry, or the shapes
            differ.

    Examples:
        >>> view0 = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> view1 = torch.tensor([[0.6, 0.4], [0.7, 0.3]])
        >>> agreement(view0, view1)
        0.5

    Source:
        The two views' assignments P' and P'' of the C2BIN paper, Section 3; the score is this
        library's.
    """
    first = _scores("assignments0", assignments0)
    second = _scores("assignments1", assignments1)
    if first.shape != second.shape:
        raise ValueError(
            "assignments0 and assignments1: expected the same shape (n, K), got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    same = first.argmax(dim=1).cpu() == second.argmax(dim=1).cpu()
    return float(same.double().mean())


def knn_accuracy(
    bank_features: Features,
    bank_labels: Integers,
    features: Features,
    labels: Integers,
    k: int,
    temperature: float,
) -> float:
    """Accuracy of the weighted k-nearest-neighbour classifier on frozen features.

    Formula: `ŷ = argmax_y Σ_{j ∈ N_k} exp(s_j / T) 1[y_j = y]` with `s_j = cos(f, f_j)` and `N_k`
    the k items of the bank nearest to the query f.

    Bank items tied for the last
    places share them equally; classes with equal votes: the lowest label wins. Hence the largest
    class of the bank is predicted when all features are equal. One class in the bank: the share of
    that class among the queries. Query classes that the bank lacks count as wrong.

    Args:
        bank_features: Shape (N, d), floating point: usually the training set.
        bank_labels: Shape (N,), integers, below zero if unlabelled (left out).
        features: Shape (n, d), floating point: the queries. Computation is on their device.
        labels: Shape (n,), integers, below zero if unlabelled (left out).
        k: Number of neighbours, at most the number of labelled bank items. The paper: 5 and 200.
        temperature: T > 0, without unit. It has no default, as defaults differ and move: 0.07 in Wu
            et al., 0.1 in lightly. State it beside the result.

    Returns:
        A float in [0, 1].

    Raises:
        TypeError: Labels or `k` are not integers, features are not floating point arrays, or
            `temperature` is not a number.
        ValueError: Wrong rank, empty, mismatched sizes, non-finite features, no labelled item,
            `k` below 1 or above the number of labelled bank items, or `temperature` not
            positive.

    Examples:
        >>> bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> queries = torch.tensor([[2.0, 0.1], [0.1, 3.0]])
        >>> knn_accuracy(bank, [4, 4, 7], queries, [4, 7], k=1, temperature=0.07)
        1.0

    Source:
        Wu, Xiong, Yu and Lin, "Unsupervised Feature Learning via Non-Parametric Instance
        Discrimination", CVPR 2018, Section 3.4; C2BIN paper, Table 1.
    """
    bank, bank_classes = _labelled_features(
        "bank_features", bank_features, "bank_labels", bank_labels
    )
    queries, truth = _labelled_features("features", features, "labels", labels)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(
            "bank_features and features: expected the same number of columns, got shapes "
            f"{tuple(bank_features.shape)} and {tuple(features.shape)}"
        )
    k = _check_k(k, bank.shape[0], "the number of labelled items in bank_features")
    _check_temperature(temperature)

    names, codes = np.unique(bank_classes, return_inverse=True)
    bank = bank.to(queries.device)
    columns = torch.from_numpy(codes.astype(np.int64)).to(queries.device)
    predicted = []
    for _, similarities in _similarity_blocks(queries, bank):
        nearest, last, share = _top(similarities, k)
        # Relative to the nearest neighbour: exp(s / T) alone overflows at small T.
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        above = nearest.values > last
        votes = similarities.new_zeros(similarities.shape[0], len(names))
        votes.scatter_add_(1, columns[nearest.indices], weights * above)
        row, column = (similarities == last).nonzero(as_tuple=True)
        votes.index_put_((row, columns[column]), (share * weights[:, -1:])[row, 0], accumulate=True)
        # Equal votes summed in another order differ in the last bits: round before comparing.
        votes = (votes / votes.amax(dim=1, keepdim=True)).round(decimals=_DECIMALS)
        predicted.append(votes.argmax(dim=1).cpu().numpy())
    return float((names[np.concatenate(predicted)] == truth).mean())


def retrieval_precision(features: Features, labels: Integers, k: int) -> float:
    """Share of an item's k nearest neighbours that have its class, averaged over items.

    Formula: `P@k = (1/n) Σ_i (1/k) Σ_{j ∈ N_k(i)} 1[y_j = y_i]`.

    Leave-one-out: every item is a query against all others, by cosine similarity. Items tied for
    the last places share them equally, so all features equal gives the value of a random ranking.
    An item that is alone in its class has precision 0. One class: 1.

    Args:
        features: Shape (n, d), floating point.
        labels: Shape (n,), integers, below zero if unlabelled (neither query nor neighbour).
        k: Number of neighbours, at most the number of labelled items minus one.

    Returns:
        A float in [0, 1].

    Raises:
        TypeError: `labels` or `k` are not integers, or `features` is not a floating point
            array.
        ValueError: Wrong rank, empty, mismatched sizes, non-finite features, no labelled item, or
            `k` below 1 or above the number of other labelled items (so always for a single item).

    Examples:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])
        >>> retrieval_precision(features, [0, 0, 1, 1], k=1)
        1.0
        >>> retrieval_precision(features, [0, 0, 1, 1], k=2)
        0.5

    Source:
        Manning, Raghavan and Schütze, "Introduction to Information Retrieval" (2008), Section 8.4;
        C2BIN paper, Figures 6 to 8.
    """
    values, classes = _labelled_features("features", features, "labels", labels)
    k = _check_k(k, values.shape[0] - 1, "the number of labelled items minus one")
    targets = torch.from_numpy(classes).to(values.device)
    total = 0.0
    for start, similarities in _similarity_blocks(values, values, leave_one_out=True):
        same = targets[start : start + similarities.shape[0], None] == targets
        _, last, share = _top(similarities, k)
        hits = (same & (similarities > last)).sum(dim=1, keepdim=True)
        tied_hits = (same & (similarities == last)).sum(dim=1, keepdim=True)
        total += float((hits + share * tied_hits).sum())
    return total / (k * values.shape[0])


def mean_average_precision(features: Features, labels: Integers) -> float:
    """Mean over items of the average precision of ranking all others by cosine similarity.

    Formula: `mAP = (1/|Q|) Σ_{i ∈ Q} (1/|R_i|) Σ_{j ∈ R_i} hits_ij / rank_ij` with `R_i` the other
    items of i's class, `hits_ij = |{l ∈ R_i : s_il ≥ s_ij}|`, `rank_ij = |{l ≠ i : s_il ≥ s_ij}|`
    and Q the items for which R_i is not empty.

    An item alone in its class has nothing to find and is no query, but is ranked for the others.
    Tied items are ranked together (as in scikit-learn's `average_precision_score`), so all features
    equal gives each query its class's share of the others. One class of two or more items: 1.

    Args:
        features: Shape (n, d), floating point.
        labels: Shape (n,), integers, below zero if unlabelled (neither query nor ranked).

    Returns:
        A float in (0, 1].

    Raises:
        TypeError: `labels` does not hold integers, or `features` is not a floating point array.
        ValueError: Wrong rank, empty, mismatched sizes, non-finite features, no labelled item, or
            no class with two items (so always for a single item).

    Examples:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])
        >>> mean_average_precision(features, [0, 0, 1, 1])
        1.0
        >>> round(mean_average_precision(features, [0, 1, 0, 1]), 4)
        0.4167

    Source:
        Manning, Raghavan and Schütze, "Introduction to Information Retrieval" (2008), Section 8.4.
    """
    values, classes = _labelled_features("features", features, "labels", labels)
    counts = np.unique(classes, return_counts=True)[1]
    if counts.max() < 2:
        raise ValueError(
            "labels: expected a class with at least two labelled items, got "
            f"{classes.size} labelled item(s), each alone in its class"
        )
    targets = torch.from_numpy(classes).to(values.device)
    others = values.shape[0] - 1
    ranks = torch.arange(1, others + 1, device=values.device)
    total = 0.0
    for start, similarities in _similarity_blocks(values, values, leave_one_out=True):
        ranked = similarities.sort(dim=1, descending=True)
        # The item itself has similarity -inf, so it is last: drop it.
        scores, order = ranked.values[:, :-1], ranked.indices[:, :-1]
        same = targets[start : start + similarities.shape[0], None] == targets[order]
        # A rank within a run of ties counts the whole run: take the rank of its last member.
        ends = torch.ones_like(same)
        ends[:, :-1] = scores[:, :-1] != scores[:, 1:]
        last = torch.where(ends, ranks, others).flip(1).cummin(dim=1).values.flip(1)
        precision = same.cumsum(dim=1).gather(1, last - 1).double() / last
        relevant = same.sum(dim=1)
        average = (precision * same).sum(dim=1) / relevant.clamp(min=1)
        total += float(average.sum())
    # A query that has nothing to find added 0 above.
    return total / int(counts[counts > 1].sum())


def _quietly(score: Callable[..., Any], *partitions: npt.NDArray[np.int64]) -> float:
    """Call scikit-learn without its guess that many clusters mean regression (1.6 and 1.7)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes")
        return float(score(*partitions))


def _integers(name: str, values: Integers) -> npt.NDArray[np.int64]:
    """Check that `values` is 1-D, non-empty and integer; bring it to the CPU as int64."""
    expected = f"{name}: expected a 1-D sequence, array or tensor of integers"
    if isinstance(values, Tensor):
        # Before numpy sees it, for numpy has no bfloat16.
        if values.is_floating_point() or values.is_complex():
            raise TypeError(f"{expected}, got dtype {values.dtype}")
        array = values.detach().cpu().numpy()
    else:
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise ValueError(f"{expected}, got nested sequences of different lengths") from error
    if array.ndim == 1 and array.size == 0:
        # First, because numpy calls an empty list float64.
        raise ValueError(f"{expected}, at least one, got none")
    if array.dtype.kind not in "iu":
        kind = type(values).__name__ if array.dtype.kind == "O" else f"dtype {array.dtype}"
        raise TypeError(f"{expected}, got {kind}")
    if array.ndim != 1:
        raise ValueError(f"{expected}, got shape {array.shape}")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        # A cast would wrap it to a negative number, which means "unlabelled".
        raise ValueError(f"{name}: expected integers below 2**63, got {array.max()}")
    return array.astype(np.int64)


def _cluster_indices(clusters: Integers) -> npt.NDArray[np.int64]:
    indices = _integers("clusters", clusters)
    if indices.min() < 0:
        # DBSCAN's noise, say: neither a cluster nor an unlabelled item, so the caller decides.
        raise ValueError(f"clusters: expected integers >= 0, got {indices.min()}")
    return indices


def _is_labelled(name: str, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    keep = labels >= 0
    if not keep.any():
        raise ValueError(
            f"{name}: expected at least one label >= 0, got {labels.size} item(s), all unlabelled "
            "(below zero)"
        )
    return keep


def _labelled(
    labels: Integers, clusters: Integers
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Check both arguments and keep the labelled items."""
    classes, indices = _integers("labels", labels), _cluster_indices(clusters)
    if classes.size != indices.size:
        raise ValueError(
            "labels and clusters: expected the same length, got "
            f"{classes.size} labels and {indices.size} clusters"
        )
    keep = _is_labelled("labels", classes)
    return classes[keep], indices[keep]


def _contingency(
    labels: npt.NDArray[np.int64], clusters: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], ...]:
    """Class (row), cluster (column) and count of every pair that occurs: at most n, not C × K.

    Only values that occur have a row or column.
    """
    _, row = np.unique(labels, return_inverse=True)
    used, column = np.unique(clusters, return_inverse=True)
    pairs, counts = np.unique(row * used.size + column, return_counts=True)
    return pairs // used.size, pairs % used.size, counts


def _double(values: Tensor) -> Tensor:
    values = values.detach()
    # Apple's MPS has no float64.
    return (values.cpu() if values.device.type == "mps" else values).double()


def _check_matrix(name: str, columns: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{name}: expected shape (n, {columns}) with n >= 1 and {columns} >= 1, got {shape}"
        )


def _check_finite(name: str, values: Tensor) -> None:
    finite = values.isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"{name}: expected finite entries, got {int((~finite).sum())} NaN or infinite of "
            f"{values.numel()}"
        )


def _scores(name: str, values: Tensor) -> Tensor:
    """Check an (n, K) matrix of assignments or logits; detached, in float64."""
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{name}: expected a floating point torch tensor, got {type(values).__name__}"
        )
    if not values.is_floating_point():
        raise TypeError(f"{name}: expected a floating point torch tensor, got dtype {values.dtype}")
    _check_matrix(name, "K", tuple(values.shape))
    _check_finite(name, values)
    return _double(values)


def _labelled_features(
    name: str, features: Features, labels_name: str, labels: Integers
) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """Check features and their labels; keep the labelled rows, as unit vectors in float64."""
    expected = f"{name}: expected a floating point torch tensor or numpy array"
    if isinstance(features, Tensor):
        if not features.is_floating_point():
            raise TypeError(f"{expected}, got dtype {features.dtype}")
        values = _double(features)
    elif isinstance(features, np.ndarray):
        if features.dtype.kind != "f":
            raise TypeError(f"{expected}, got dtype {features.dtype}")
        # A copy, since torch takes neither read-only memory nor foreign byte order as it is.
        values = torch.from_numpy(np.array(features, dtype=np.float64, order="C"))
    else:
        raise TypeError(f"{expected}, got {type(features).__name__}")
    _check_matrix(name, "d", tuple(values.shape))
    classes = _integers(labels_name, labels)
    if classes.size != values.shape[0]:
        raise ValueError(
            f"{name} and {labels_name}: expected one label per row, got "
            f"{values.shape[0]} rows and {classes.size} labels"
        )
    keep = _is_labelled(labels_name, classes)
    _check_finite(name, values)
    values = values[torch.from_numpy(keep).to(values.device)]
    # Largest entry to 1 first: the squares of a tiny or huge vector would under- or overflow. A
    # zero vector stays zero, so that its cosine with anything is 0.
    largest = values.abs().amax(dim=1, keepdim=True)
    values = values / torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values / torch.where(norms > 0, norms, 1.0), classes[keep]


def _similarity_blocks(
    queries: Tensor, bank: Tensor, leave_one_out: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, cosines of a block of query rows with the whole bank)."""
    rows = max(1, _BLOCK_ELEMENTS // bank.shape[0])
    for start in range(0, queries.shape[0], rows):
        block = (queries[start : start + rows] @ bank.T).round(decimals=_DECIMALS)
        if leave_one_out:
            own = torch.arange(block.shape[0], device=block.device)
            block[own, start + own] = -math.inf
        yield start, block


def _top(similarities: Tensor, k: int) -> tuple[torch.return_types.topk, Tensor, Tensor]:
    """Find each row's k largest, the k-th value, and the share of a place for items equal to it.

    The last two have shape (rows, 1). Items above the k-th value have a whole place each.
    """
    nearest = similarities.topk(k, dim=1)
    last = nearest.values[:, -1:]
    left = k - (nearest.values > last).sum(dim=1, keepdim=True)
    tied = (similarities == last).sum(dim=1, keepdim=True)
    return nearest, last, left.double() / tied


def _check_k(k: int, largest: int, meaning: str) -> int:
    expected = f"k: expected an integer from 1 to {largest} ({meaning})"
    if isinstance(k, bool):
        raise TypeError(f"{expected}, got a bool")
    try:
        value = operator.index(k)
    except TypeError as error:
        raise TypeError(f"{expected}, got {type(k).__name__}") from error
    if not 1 <= value <= largest:
        raise ValueError(f"{expected}, got {value}")
    return value


def _check_temperature(temperature: float) -> None:
    expected = "temperature: expected a finite number above 0"
    if isinstance(temperature, bool):
        raise TypeError(f"{expected}, got a bool")
    try:
        valid = math.isfinite(temperature) and temperature > 0
    except TypeError as error:
        raise TypeError(f"{expected}, got {type(temperature).__name__}") from error
    if not valid:
        raise ValueError(f"{expected}, got {temperature}")
