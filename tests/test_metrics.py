"""Every score against an oracle of plain loops, then its properties, its edges and its errors."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import textwrap
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from c2bin_ext import metrics

# ---- oracles: Python numbers and loops; nothing of numpy, scipy, scikit-learn or torch ----


def loop_nmi(labels: list[int], clusters: list[int]) -> float:
    def entropy(names: list[Any]) -> float:
        return -sum(c / len(names) * math.log(c / len(names)) for c in Counter(names).values())

    h_labels, h_clusters = entropy(labels), entropy(clusters)
    if h_labels == 0 and h_clusters == 0:
        return 1.0
    joint = entropy(list(zip(labels, clusters, strict=True)))
    return 2 * (h_labels + h_clusters - joint) / (h_labels + h_clusters)


def loop_ari(labels: list[int], clusters: list[int]) -> float:
    both = only_label = only_cluster = neither = 0
    for i, j in itertools.combinations(range(len(labels)), 2):
        same_label, same_cluster = labels[i] == labels[j], clusters[i] == clusters[j]
        both += same_label and same_cluster
        only_label += same_label and not same_cluster
        only_cluster += same_cluster and not same_label
        neither += not same_label and not same_cluster
    if only_label == only_cluster == 0:
        return 1.0
    above = 2 * (both * neither - only_label * only_cluster)
    below = (both + only_label) * (only_label + neither)
    below += (both + only_cluster) * (only_cluster + neither)
    return above / below


def loop_accuracy(labels: list[int], clusters: list[int]) -> float:
    names, used = sorted(set(labels)), sorted(set(clusters))
    # Surplus clusters are matched with None, which is nobody's label.
    padded = names + [None] * max(0, len(used) - len(names))
    return max(
        sum(
            dict(zip(used, chosen, strict=True))[c] == y
            for y, c in zip(labels, clusters, strict=True)
        )
        for chosen in itertools.permutations(padded, len(used))
    ) / len(labels)


def loop_purity(labels: list[int], clusters: list[int]) -> float:
    right = 0
    for cluster in set(clusters):
        members = [y for y, c in zip(labels, clusters, strict=True) if c == cluster]
        right += max(members.count(y) for y in members)
    return right / len(labels)


def loop_cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return round(sum(x * y for x, y in zip(a, b, strict=True)) / lengths, 10) if lengths else 0.0


def loop_places(similarities: list[float], k: int) -> list[float]:
    """How much of one of the k places each item has: ties at the border share what is left."""
    border = sorted(similarities, reverse=True)[k - 1]
    above = sum(s > border for s in similarities)
    tied = similarities.count(border)
    return [1.0 if s > border else (k - above) / tied if s == border else 0.0 for s in similarities]


def loop_knn(
    bank: list[list[float]],
    bank_labels: list[int],
    queries: list[list[float]],
    labels: list[int],
    k: int,
    temperature: float,
) -> float:
    kept = [(f, y) for f, y in zip(bank, bank_labels, strict=True) if y >= 0]
    right = total = 0
    for query, truth in zip(queries, labels, strict=True):
        if truth < 0:
            continue
        similarities = [loop_cosine(query, f) for f, _ in kept]
        votes: dict[int, float] = {}
        for place, s, (_, y) in zip(loop_places(similarities, k), similarities, kept, strict=True):
            votes[y] = votes.get(y, 0.0) + place * math.exp(s / temperature)
        best = max(votes.values())
        right += min(y for y, v in votes.items() if v > best * (1 - 1e-9)) == truth
        total += 1
    return right / total


def loop_precision(features: list[list[float]], labels: list[int], k: int) -> float:
    kept = [(f, y) for f, y in zip(features, labels, strict=True) if y >= 0]
    values = []
    for i, (query, truth) in enumerate(kept):
        others = kept[:i] + kept[i + 1 :]
        places = loop_places([loop_cosine(query, f) for f, _ in others], k)
        hits = [p for p, (_, y) in zip(places, others, strict=True) if y == truth]
        values.append(sum(hits) / k)
    return sum(values) / len(values)


def sklearn_map(features: list[list[float]], labels: list[int]) -> float:
    """Independent of our ranking: similarities from the loop, average precision by scikit-learn."""
    kept = [(f, y) for f, y in zip(features, labels, strict=True) if y >= 0]
    values = []
    for i, (query, truth) in enumerate(kept):
        others = kept[:i] + kept[i + 1 :]
        same = [y == truth for _, y in others]
        if any(same):
            scores = [loop_cosine(query, f) for f, _ in others]
            values.append(float(average_precision_score(same, scores)))
    return sum(values) / len(values)


# ---- data ----

Partition = tuple[list[int], list[int]]
PARTITION_SCORES = [
    (metrics.normalized_mutual_information, loop_nmi),
    (metrics.adjusted_rand_index, loop_ari),
    (metrics.clustering_accuracy, loop_accuracy),
    (metrics.purity, loop_purity),
]
partition_scores = pytest.mark.parametrize(
    "score", [score for score, _ in PARTITION_SCORES], ids=lambda score: score.__name__
)


@st.composite
def partitions(draw: st.DrawFn, max_size: int = 14) -> Partition:
    pairs = st.tuples(st.integers(0, 3), st.integers(0, 4))
    drawn = draw(st.lists(pairs, min_size=1, max_size=max_size))
    return [y for y, _ in drawn], [c for _, c in drawn]


@st.composite
def labelled_features(draw: st.DrawFn, min_size: int = 2) -> tuple[list[list[float]], list[int]]:
    # Small integers: many exact ties and zero vectors, which is where rankings go wrong.
    rows = st.lists(st.integers(-2, 2).map(float), min_size=3, max_size=3)
    items = draw(st.lists(st.tuples(rows, st.integers(0, 2)), min_size=min_size, max_size=12))
    return [f for f, _ in items], [y for _, y in items]


def blobs(n: int, seed: int, classes: int = 4, d: int = 6) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    labels = [i % classes for i in range(n)]
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return noise + 1.2 * torch.eye(classes, d, dtype=torch.float64)[labels], labels


# ---- labels against clusters ----


@pytest.mark.parametrize(
    ("score", "oracle"), PARTITION_SCORES, ids=lambda function: function.__name__
)
@given(data=partitions())
def test_partition_scores_equal_the_loops(
    score: Callable[..., float], oracle: Callable[..., float], data: Partition
) -> None:
    assert score(*data) == pytest.approx(oracle(*data), abs=1e-12)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (metrics.normalized_mutual_information, 0.3645617718571898),  # Manning et al., Section 16.3
        (metrics.adjusted_rand_index, 0.2429149797570850),
        (metrics.clustering_accuracy, 12 / 17),
        (metrics.purity, 12 / 17),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_textbook_example(score: Callable[..., float], expected: float) -> None:
    # Three clusters of crosses, circles and diamonds; the book prints NMI 0.36, purity 0.71.
    labels = [0] * 5 + [1] + [0] + [1] * 4 + [2] + [0] * 2 + [2] * 3
    clusters = [0] * 6 + [1] * 6 + [2] * 5
    assert score(labels, clusters) == pytest.approx(expected, abs=1e-12)


@partition_scores
@given(data=partitions(), renamed=st.permutations(range(5)), offset=st.integers(0, 10**12))
def test_names_do_not_matter(
    score: Callable[..., float], data: Partition, renamed: list[int], offset: int
) -> None:
    labels, clusters = data
    other = [renamed[c] * 1000 + offset for c in clusters]
    assert score(labels, other) == pytest.approx(score(labels, clusters), abs=1e-12)
    other = [renamed[y] * 1000 + offset for y in labels]
    assert score(other, clusters) == pytest.approx(score(labels, clusters), abs=1e-12)


@partition_scores
@given(data=partitions(), random=st.randoms(use_true_random=False))
def test_order_of_items_does_not_matter(
    score: Callable[..., float], data: Partition, random: Any
) -> None:
    pairs = list(zip(*data, strict=True))
    random.shuffle(pairs)
    shuffled = [y for y, _ in pairs], [c for _, c in pairs]
    assert score(*shuffled) == pytest.approx(score(*data), abs=1e-12)


@partition_scores
@given(data=partitions(max_size=40))
def test_bounds(score: Callable[..., float], data: Partition) -> None:
    value = score(*data)
    assert isinstance(value, float)
    # No tolerance: rounding must not leave the interval.
    assert (-0.5 if score is metrics.adjusted_rand_index else 0.0) <= value <= 1.0


@partition_scores
@given(labels=st.lists(st.integers(0, 6), min_size=1, max_size=40))
@example(labels=[*range(25), *range(5)])  # scikit-learn's NMI: 1.0000000000000002
def test_perfect_is_one(score: Callable[..., float], labels: list[int]) -> None:
    value = score(labels, [99 - 2 * y for y in labels])
    assert 1 - 1e-12 <= value <= 1.0


@given(data=partitions(max_size=40))
def test_symmetric_scores(data: Partition) -> None:
    labels, clusters = data
    for score in (
        metrics.normalized_mutual_information,
        metrics.adjusted_rand_index,
        metrics.clustering_accuracy,
    ):
        assert score(labels, clusters) == pytest.approx(score(clusters, labels), abs=1e-12)


@given(data=partitions(max_size=40))
def test_purity_is_at_least_accuracy(data: Partition) -> None:
    assert metrics.purity(*data) >= metrics.clustering_accuracy(*data)


@partition_scores
@given(data=partitions(), extra=st.lists(st.tuples(st.integers(-9, -1), st.integers(0, 9))))
def test_unlabelled_items_change_nothing(
    score: Callable[..., float], data: Partition, extra: list[tuple[int, int]]
) -> None:
    labels, clusters = data
    more = [y for y, _ in extra] + labels, [c for _, c in extra] + clusters
    assert score(*more) == score(*data)


@pytest.mark.parametrize(
    ("case", "labels", "clusters", "nmi", "ari", "accuracy", "pure"),
    [
        ("one item", [4], [9], 1.0, 1.0, 1.0, 1.0),
        ("one class, one cluster", [2, 2, 2], [5, 5, 5], 1.0, 1.0, 1.0, 1.0),
        ("one cluster", [0, 0, 0, 1], [3, 3, 3, 3], 0.0, 0.0, 0.75, 0.75),
        ("one class", [6, 6, 6, 6], [0, 0, 0, 1], 0.0, 0.0, 0.75, 1.0),
        ("all apart in both", [0, 1, 2], [2, 0, 1], 1.0, 1.0, 1.0, 1.0),
        ("all apart", [0, 0, 1, 1], [0, 1, 2, 3], 2 / 3, 0.0, 0.5, 1.0),
        ("surplus clusters", [0, 0, 0, 1, 1], [0, 0, 2, 1, 1], None, None, 0.8, 1.0),
        ("surplus classes", [0, 0, 1, 2], [0, 0, 1, 1], 0.8, None, 0.75, 0.75),
        ("empty clusters between", [0, 0, 1, 1], [0, 0, 99, 99], 1.0, 1.0, 1.0, 1.0),
        ("independent", [0, 0, 1, 1], [0, 1, 0, 1], 0.0, -0.5, 0.5, 0.5),
    ],
)
def test_degenerate_partitions(
    case: str,
    labels: list[int],
    clusters: list[int],
    nmi: float | None,
    ari: float | None,
    accuracy: float,
    pure: float,
) -> None:
    expected = [nmi, ari, accuracy, pure]
    for (score, oracle), value in zip(PARTITION_SCORES, expected, strict=True):
        value = oracle(labels, clusters) if value is None else value
        assert score(labels, clusters) == pytest.approx(value, abs=1e-12), case


def test_the_greedy_matching_is_not_enough() -> None:
    # Matching the largest cell first (5) leaves 0; the best matching is 4 + 4.
    labels = [0] * 9 + [1] * 4
    clusters = [0] * 5 + [1] * 4 + [0] * 4
    assert metrics.clustering_accuracy(labels, clusters) == 8 / 13


@partition_scores
def test_any_container_and_integer_dtype(score: Callable[..., float]) -> None:
    labels, clusters = [0, 0, 1, 1, 2, -1], [1, 1, 0, 2, 2, 0]
    expected = score(labels, clusters)
    signed = [np.int8, np.int16, np.int32, np.int64]
    for dtype in [*signed, np.uint8, np.uint16, np.uint32, np.uint64]:
        assert score(np.array(labels), np.array(clusters, dtype=dtype)) == expected
    for dtype in signed:
        assert score(np.array(labels, dtype=dtype), tuple(clusters)) == expected
    for torch_dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        assert score(torch.tensor(labels, dtype=torch_dtype), torch.tensor(clusters)) == expected
    assert score(torch.tensor(labels), range(6)) == score(labels, list(range(6)))


@partition_scores
def test_many_clusters_do_not_warn(
    score: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    # scikit-learn 1.6 and 1.7 take many clusters for a regression target; later ones do not.
    for name in ("adjusted_rand_score", "normalized_mutual_info_score"):
        real = getattr(metrics, name)

        def chatty(*arguments: Any, real: Callable[..., float] = real) -> float:
            warnings.warn("The number of unique classes is greater than 50%", stacklevel=2)
            return real(*arguments)

        monkeypatch.setattr(metrics, name, chatty)
    labels = [*range(25), *range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(labels, labels) == pytest.approx(1.0, abs=1e-12)


# ---- clusters alone, assignments ----


def test_counts_are_sparse() -> None:
    """A table of 60,000 classes by as many clusters would take 28 GB."""
    n = 60_000
    clusters = torch.randperm(n, generator=torch.Generator().manual_seed(0)) // 2
    tracemalloc.start()
    try:
        accuracy = metrics.clustering_accuracy(torch.arange(n), clusters)
        dominant = metrics.purity(torch.arange(n), clusters)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Two items in each cluster, each alone in its class: one of them is matched.
    assert accuracy == dominant == 0.5
    assert peak < 1000 * n


def test_clusters_in_use() -> None:
    assert metrics.clusters_in_use([7]) == 1
    assert metrics.clusters_in_use([3, 3, 3]) == 1
    assert metrics.clusters_in_use(torch.tensor([0, 5, 5, 2])) == 3
    assert type(metrics.clusters_in_use(np.array([0, 1], dtype=np.uint8))) is int


@given(clusters=st.lists(st.integers(0, 2**62), min_size=1))
def test_clusters_in_use_counts_values(clusters: list[int]) -> None:
    assert metrics.clusters_in_use(clusters) == len(set(clusters))


@given(
    masses=st.lists(
        st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any), min_size=1, max_size=8
    )
)
def test_effective_clusters_equals_the_loop(masses: list[list[int]]) -> None:
    rows = [[m / sum(row) for m in row] for row in masses]
    means = [sum(row[k] for row in rows) / len(rows) for k in range(4)]
    expected = math.exp(-sum(m * math.log(m) for m in means if m > 0))
    value = metrics.effective_clusters(torch.tensor(rows, dtype=torch.float64))
    assert type(value) is float
    assert value == pytest.approx(expected, abs=1e-12)
    assert 1.0 <= value <= 4.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("clusters", [1, 2, 3, 10, 128, 2048])
def test_effective_clusters_extremes(dtype: torch.dtype, clusters: int) -> None:
    uniform = torch.full((5, clusters), 1 / clusters).to(dtype)
    assert metrics.effective_clusters(uniform) == pytest.approx(clusters, rel=1e-12)
    assert metrics.effective_clusters(uniform) <= clusters
    collapsed = torch.zeros(5, clusters, dtype=dtype)
    collapsed[:, -1] = 1
    assert metrics.effective_clusters(collapsed) == 1.0
    balanced = torch.eye(clusters).to(dtype)  # torch 2.2 has no eye of bfloat16
    assert metrics.effective_clusters(balanced) == pytest.approx(clusters, rel=1e-12)


def test_effective_clusters_ignores_empty_clusters_and_gradients() -> None:
    half = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], requires_grad=True)
    assert metrics.effective_clusters(half) == pytest.approx(2.0)
    assert metrics.effective_clusters(half[:1]) == pytest.approx(2.0)


def test_effective_clusters_sums_in_float64() -> None:
    # A float16 sum of 8192 rows of 0.3 stops far from 2457.6, a float32 one at the 5th digit.
    rows = torch.tensor([[0.3, 0.7]], dtype=torch.float64).repeat(100_003, 1)
    low = metrics.effective_clusters(rows.float())
    p, q = (float(x) for x in rows[0].float().double())
    p, q = p / (p + q), q / (p + q)
    assert low == pytest.approx(math.exp(-p * math.log(p) - q * math.log(q)), rel=1e-13)
    half = torch.tensor([[0.3, 0.7]], dtype=torch.float16).repeat(8192, 1)
    assert metrics.effective_clusters(half) == pytest.approx(low, rel=1e-3)


def test_agreement() -> None:
    view0 = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    view1 = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]])
    assert metrics.agreement(view0, view1) == 2 / 3
    assert metrics.agreement(view0, view0) == 1.0
    assert metrics.agreement(view0[1:2], view1[1:2]) == 0.0
    assert metrics.agreement(view0.log(), view1.half()) == 2 / 3
    assert type(metrics.agreement(view0, view1)) is float


def test_agreement_degenerate() -> None:
    uniform = torch.full((3, 4), 0.25)
    assert metrics.agreement(uniform, torch.eye(4)[[0, 0, 1]]) == 2 / 3  # ties: lowest index
    assert metrics.agreement(torch.ones(3, 1), torch.ones(3, 1)) == 1.0
    collapsed = torch.eye(4)[[2, 2, 2]]
    assert metrics.agreement(collapsed, collapsed) == 1.0


@given(
    pairs=st.lists(
        st.tuples(st.permutations(range(4)), st.permutations(range(4))), min_size=1, max_size=20
    )
)
def test_agreement_equals_the_loop(pairs: list[tuple[list[int], list[int]]]) -> None:
    expected = sum(a.index(3) == b.index(3) for a, b in pairs) / len(pairs)
    view0 = torch.tensor([a for a, _ in pairs], dtype=torch.float32)
    view1 = torch.tensor([b for _, b in pairs], dtype=torch.float32)
    assert metrics.agreement(view0, view1) == pytest.approx(expected, abs=1e-15)


# ---- features ----


@given(
    bank=labelled_features(),
    queries=labelled_features(min_size=1),
    data=st.data(),
    temperature=st.sampled_from([0.07, 0.1, 1.0, 10.0]),
)
def test_knn_equals_the_loop(
    bank: tuple[list[list[float]], list[int]],
    queries: tuple[list[list[float]], list[int]],
    data: st.DataObject,
    temperature: float,
) -> None:
    k = data.draw(st.integers(1, len(bank[1])))
    value = metrics.knn_accuracy(
        torch.tensor(bank[0]), bank[1], torch.tensor(queries[0]), queries[1], k, temperature
    )
    assert type(value) is float
    assert value == pytest.approx(loop_knn(*bank, *queries, k, temperature), abs=1e-12)


@pytest.mark.parametrize("k", [1, 5, 60, 200, 240])
# At T = 0.0015 exp(1 / T) is near the largest number the oracle can hold.
@pytest.mark.parametrize("temperature", [0.0015, 0.07, 1.0])
def test_knn_equals_the_loop_on_blobs(k: int, temperature: float) -> None:
    bank, queries = blobs(240, 0), blobs(57, 1)
    expected = loop_knn(bank[0].tolist(), bank[1], queries[0].tolist(), queries[1], k, temperature)
    assert 0.3 < expected < 0.95
    assert metrics.knn_accuracy(*bank, *queries, k, temperature) == pytest.approx(expected)


def test_knn_weights_decide() -> None:
    # One near neighbour of class 5, two far ones of class 1: T decides who wins.
    bank = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 2.0]])
    query = torch.tensor([[1.0, 0.0]])
    arguments = (bank, [5, 1, 1], query, [5], 3)
    assert metrics.knn_accuracy(*arguments, temperature=0.1) == 1.0
    assert metrics.knn_accuracy(*arguments, temperature=10.0) == 0.0
    # exp(1 / T) overflows float64 here; the result must not.
    assert metrics.knn_accuracy(*arguments, temperature=1e-6) == 1.0


@pytest.mark.parametrize("nudge", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("labels", [[4, 9, 9], [9, 4, 4]])
def test_knn_equal_votes_survive_rounding(labels: list[int], nudge: float) -> None:
    # T makes two orthogonal neighbours weigh as much as one equal to the query, give or take an
    # ulp: the lowest label wins on either side.
    temperature = math.nextafter(1 / math.log(2), nudge) if nudge != 1.0 else 1 / math.log(2)
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert metrics.knn_accuracy(bank, labels, bank[:1], [4], 3, temperature) == 1.0


def test_knn_degenerate() -> None:
    bank, labels = torch.ones(5, 3), [2, 2, 1, 1, 1]
    queries = torch.eye(3)
    for k in range(1, 6):  # equal features: the bank's largest class, whatever k and the order
        assert metrics.knn_accuracy(bank, labels, queries, [1, 2, 1], k, 0.1) == 2 / 3
    # equal votes: the lowest label
    assert metrics.knn_accuracy(bank[:2], [9, 4], queries[:1], [4], 2, 0.1) == 1.0
    # one class in the bank; a query class that the bank lacks
    assert metrics.knn_accuracy(queries, [3, 3, 3], queries, [3, 3, 8], 2, 0.1) == 2 / 3
    # one item each
    assert metrics.knn_accuracy(queries[:1], [0], queries[1:2], [0], 1, 0.1) == 1.0
    # a zero vector is equally far from all
    assert metrics.knn_accuracy(queries, [0, 1, 1], torch.zeros(1, 3), [1], 1, 0.1) == 1.0


def test_knn_leaves_unlabelled_items_out() -> None:
    bank, labels = blobs(60, 2)
    queries, truth = blobs(30, 3)
    holes = [-1 if i % 3 == 0 else y for i, y in enumerate(labels)]
    gaps = [-2 if i % 4 == 0 else y for i, y in enumerate(truth)]
    keep, ask = (
        [i for i, y in enumerate(holes) if y >= 0],
        [i for i, y in enumerate(gaps) if y >= 0],
    )
    expected = metrics.knn_accuracy(
        bank[keep], [labels[i] for i in keep], queries[ask], [truth[i] for i in ask], 5, 0.07
    )
    assert metrics.knn_accuracy(bank, holes, queries, gaps, 5, 0.07) == expected
    assert metrics.knn_accuracy(bank, holes, queries, gaps, 5, 0.07) == loop_knn(
        bank.tolist(), holes, queries.tolist(), gaps, 5, 0.07
    )


@given(data=labelled_features(), draw=st.data())
def test_precision_equals_the_loop(
    data: tuple[list[list[float]], list[int]], draw: st.DataObject
) -> None:
    k = draw.draw(st.integers(1, len(data[1]) - 1))
    value = metrics.retrieval_precision(torch.tensor(data[0]), data[1], k)
    assert type(value) is float
    assert value == pytest.approx(loop_precision(*data, k), abs=1e-12)


@given(data=labelled_features(min_size=4))
def test_average_precision_equals_scikit_learn(
    data: tuple[list[list[float]], list[int]],
) -> None:
    value = metrics.mean_average_precision(torch.tensor(data[0]), data[1])
    assert type(value) is float
    assert value == pytest.approx(sklearn_map(*data), abs=1e-12)


@pytest.mark.parametrize("k", [1, 5, 79])
def test_retrieval_equals_the_loops_on_blobs(k: int) -> None:
    features, labels = blobs(80, 4)
    labels[3] = labels[17] = -1
    labels[5] = 77  # alone in its class
    rows = features.tolist()
    k = min(k, 77)
    assert metrics.retrieval_precision(features, labels, k) == pytest.approx(
        loop_precision(rows, labels, k), abs=1e-12
    )
    assert metrics.mean_average_precision(features, labels) == pytest.approx(
        sklearn_map(rows, labels), abs=1e-12
    )


def test_retrieval_by_hand() -> None:
    # Ranked from item 0: classes 1, 0, 1; from 1: 0, 0, 1; from 2: 1, 1, 0; from 3: 0, 1, 0.
    features = torch.tensor([[1.0, 0.0], [0.9, 0.2], [0.5, 0.9], [0.1, 1.0]])
    labels = [0, 1, 0, 1]
    assert metrics.retrieval_precision(features, labels, 1) == 0.0
    assert metrics.retrieval_precision(features, labels, 2) == pytest.approx((1 + 0 + 0 + 1) / 8)
    expected = (1 / 2 + 1 / 3 + 1 / 3 + 1 / 2) / 4
    assert metrics.mean_average_precision(features, labels) == pytest.approx(expected, abs=1e-12)


def test_retrieval_degenerate() -> None:
    collapsed, labels = torch.ones(5, 2), [0, 0, 0, 1, 1]
    chance = (3 * 2 / 4 + 2 * 1 / 4) / 5
    for k in range(1, 5):
        assert metrics.retrieval_precision(collapsed, labels, k) == pytest.approx(chance)
        assert metrics.retrieval_precision(torch.zeros(5, 2), labels, k) == pytest.approx(chance)
        assert metrics.retrieval_precision(collapsed, [6] * 5, k) == 1.0
        assert metrics.retrieval_precision(collapsed, range(5), k) == 0.0
    assert metrics.mean_average_precision(collapsed, labels) == pytest.approx(chance)
    assert metrics.mean_average_precision(collapsed, [6] * 5) == 1.0
    assert metrics.mean_average_precision(collapsed[:2], [1, 1]) == 1.0
    # an item alone in its class is no query, but it is in the way of others
    line = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.7, 0.7]])
    assert metrics.mean_average_precision(line, [0, 3, 0]) == 0.5


def all_feature_scores(
    features: Any, labels: Any, queries: Any, truth: Any
) -> tuple[float, float, float]:
    return (
        metrics.knn_accuracy(features, labels, queries, truth, 5, 0.07),
        metrics.retrieval_precision(features, labels, 5),
        metrics.mean_average_precision(features, labels),
    )


@given(random=st.randoms(use_true_random=False), data=labelled_features(min_size=6))
def test_feature_scores_do_not_depend_on_order(
    random: Any, data: tuple[list[list[float]], list[int]]
) -> None:
    order = list(range(len(data[1])))
    random.shuffle(order)
    features, labels = torch.tensor(data[0]), data[1]
    other = features[order], [labels[i] for i in order]
    assert all_feature_scores(*other, *other) == pytest.approx(
        all_feature_scores(features, labels, features, labels), abs=1e-12
    )


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e-5, 3.7, 1e5, 1e200])
def test_feature_scores_do_not_depend_on_length(scale: float) -> None:
    bank, queries = blobs(80, 6), blobs(40, 7)
    expected = all_feature_scores(*bank, *queries)
    lengths = torch.linspace(1, 9, 80, dtype=torch.float64)[:, None] * scale
    scaled = all_feature_scores(bank[0] * lengths, bank[1], queries[0] * scale, queries[1])
    assert scaled == pytest.approx(expected, abs=1e-12)


@given(data=labelled_features(min_size=6))
def test_feature_scores_are_bounded(data: tuple[list[list[float]], list[int]]) -> None:
    features = torch.tensor(data[0])
    for value in all_feature_scores(features, data[1], features, data[1]):
        assert -1e-12 <= value <= 1 + 1e-12


def test_feature_scores_of_separated_classes_are_one() -> None:
    labels = [0] * 7 + [1] * 7 + [2] * 7
    features = torch.eye(3)[labels] + torch.linspace(0, 0.2, 21)[:, None]
    assert all_feature_scores(features, labels, features, labels) == (1.0, 1.0, 1.0)


def test_feature_containers_and_dtypes() -> None:
    # Values that every dtype holds exactly.
    generator = torch.Generator().manual_seed(8)
    features = torch.randint(-8, 9, (40, 4), generator=generator).double()
    labels = [i % 3 for i in range(40)]
    expected = all_feature_scores(features, labels, features, labels)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        low = features.to(dtype).requires_grad_()
        assert all_feature_scores(low, labels, low, labels) == expected
    for numpy_dtype in ("float64", "float32", "float16", ">f4", "longdouble"):
        array = features.numpy().astype(numpy_dtype)
        array.setflags(write=False)
        assert all_feature_scores(array, labels, array, torch.tensor(labels)) == expected
    backwards = features.numpy()[::-1]
    assert all_feature_scores(backwards, labels[::-1], features, labels) == pytest.approx(expected)


@pytest.mark.parametrize("elements", [1, 130, 1000, 2**22])
def test_blocks_do_not_change_the_scores(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = blobs(60, 9), blobs(31, 10)
    expected = all_feature_scores(*bank, *queries)
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", elements)
    shapes = []
    real = metrics._similarity_blocks

    def watched(*arguments: Any, **options: Any) -> Any:
        for start, block in real(*arguments, **options):
            shapes.append(tuple(block.shape))
            yield start, block

    monkeypatch.setattr(metrics, "_similarity_blocks", watched)
    assert all_feature_scores(*bank, *queries) == pytest.approx(expected, abs=1e-12)
    # Bounded memory: no block above the budget, unless one row alone is.
    assert all(rows * columns <= max(elements, columns) for rows, columns in shapes)
    assert sum(rows for rows, _ in shapes) == 31 + 60 + 60


def test_equal_vectors_tie_wherever_they_stand() -> None:
    # Without rounding, blocked kernels give copies of one vector similarities that differ by an
    # ulp with their column, and the ranking would be by chance.
    row = torch.randn(1, 257, generator=torch.Generator().manual_seed(11))
    features, labels = row.repeat(203, 1), [0] * 100 + [1] * 103
    chance = (100 * 99 + 103 * 102) / 202 / 203
    for k in (1, 5, 100, 202):
        assert metrics.retrieval_precision(features, labels, k) == pytest.approx(chance, rel=1e-12)
    assert metrics.mean_average_precision(features, labels) == pytest.approx(chance, rel=1e-12)
    assert metrics.knn_accuracy(features, labels, features, labels, 5, 0.07) == 103 / 203


# ---- errors: type, argument, what came, what was expected ----

F = torch.eye(3)
RAGGED: Any = [[0, 1], [2]]
BAD_INTEGERS: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "at least one, got none"),
    (torch.tensor([], dtype=torch.int64), ValueError, "at least one, got none"),
    ([[0, 1], [1, 0]], ValueError, r"got shape \(2, 2\)"),
    (3, ValueError, r"got shape \(\)"),
    (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"got shape \(2, 1\)"),
    (RAGGED, ValueError, "nested sequences of different lengths"),
    (np.array([0, 2**63], dtype=np.uint64), ValueError, "below 2\\*\\*63, got 9223372036854775808"),
    ([0.0, 1.0], TypeError, "got dtype float64"),
    (np.array([0.0, 1.0], dtype=np.float32), TypeError, "got dtype float32"),
    (torch.tensor([0.0, 1.0]), TypeError, "got dtype torch.float32"),
    (torch.tensor([0.0, 1.0], dtype=torch.bfloat16), TypeError, "got dtype torch.bfloat16"),
    (torch.tensor([0j, 1j]), TypeError, "got dtype torch.complex64"),
    (torch.tensor([True, False]), TypeError, "got dtype bool"),
    ([True, False], TypeError, "got dtype bool"),
    (["cat", "dog"], TypeError, "got dtype <U3"),
    (None, TypeError, "got NoneType"),
    ([0, None], TypeError, "got list"),
    ([0, 2**70], TypeError, "got list"),
]


@pytest.mark.parametrize(("bad", "kind", "message"), BAD_INTEGERS)
@partition_scores
def test_bad_integers(
    score: Callable[..., float], bad: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"^labels: expected .*integers.*{message}"):
        score(bad, [0, 1])
    with pytest.raises(kind, match=f"^clusters: expected .*integers.*{message}"):
        score([0, 1], bad)


@pytest.mark.parametrize(("bad", "kind", "message"), BAD_INTEGERS)
def test_bad_integers_elsewhere(bad: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^clusters: expected .*{message}"):
        metrics.clusters_in_use(bad)
    with pytest.raises(kind, match=f"^bank_labels: expected .*{message}"):
        metrics.knn_accuracy(F, bad, F, [0, 1, 2], 1, 0.1)
    with pytest.raises(kind, match=f"^labels: expected .*{message}"):
        metrics.knn_accuracy(F, [0, 1, 2], F, bad, 1, 0.1)
    with pytest.raises(kind, match=f"^labels: expected .*{message}"):
        metrics.retrieval_precision(F, bad, 1)
    with pytest.raises(kind, match=f"^labels: expected .*{message}"):
        metrics.mean_average_precision(F, bad)


@partition_scores
def test_lengths_signs_and_no_labels(score: Callable[..., float]) -> None:
    message = "^labels and clusters: expected the same length, got 3 labels and 2 clusters$"
    with pytest.raises(ValueError, match=message):
        score([0, 1, 2], [0, 1])
    # One cluster would broadcast, so it must not get that far.
    with pytest.raises(ValueError, match="got 3 labels and 1 clusters"):
        score([0, 1, 2], [0])
    with pytest.raises(ValueError, match=r"^clusters: expected integers >= 0, got -1$"):
        score([0, -1], [0, -1])
    message = (
        r"^labels: expected at least one label >= 0, got 2 item\(s\), all unlabelled \(below zero\)"
    )
    with pytest.raises(ValueError, match=message):
        score([-1, -5], [0, 1])


def test_negative_clusters_in_use() -> None:
    with pytest.raises(ValueError, match=r"^clusters: expected integers >= 0, got -3$"):
        metrics.clusters_in_use([0, -3])


BAD_SCORES: list[tuple[Any, type[Exception], str]] = [
    ([[0.5, 0.5]], TypeError, "expected a floating point torch tensor, got list"),
    (np.ones((2, 1)), TypeError, "expected a floating point torch tensor, got ndarray"),
    (torch.eye(2, dtype=torch.int64), TypeError, "floating point .* got dtype torch.int64"),
    (torch.eye(2, dtype=torch.bool), TypeError, "floating point .* got dtype torch.bool"),
    (torch.eye(2, dtype=torch.complex64), TypeError, "got dtype torch.complex64"),
    (torch.ones(2), ValueError, r"expected shape \(n, K\) .* got \(2,\)"),
    (torch.ones(1, 2, 1), ValueError, r"expected shape \(n, K\) .* got \(1, 2, 1\)"),
    (torch.ones(0, 2), ValueError, r"n >= 1 and K >= 1, got \(0, 2\)"),
    (torch.ones(2, 0), ValueError, r"n >= 1 and K >= 1, got \(2, 0\)"),
    (torch.tensor([[math.nan, 1.0]]), ValueError, "finite entries, got 1 NaN or infinite of 2"),
    (torch.tensor([[math.inf, -math.inf]]), ValueError, "got 2 NaN or infinite of 2"),
]


@pytest.mark.parametrize(("bad", "kind", "message"), BAD_SCORES)
def test_bad_assignments(bad: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^assignments: .*{message}"):
        metrics.effective_clusters(bad)
    with pytest.raises(kind, match=f"^assignments0: .*{message}"):
        metrics.agreement(bad, torch.eye(2))
    with pytest.raises(kind, match=f"^assignments1: .*{message}"):
        metrics.agreement(torch.eye(2), bad)


def test_assignments_that_are_no_probabilities() -> None:
    with pytest.raises(
        ValueError, match=r"^assignments: .*>= 0, got a smallest entry of -0\.5; apply"
    ):
        metrics.effective_clusters(torch.tensor([[1.5, -0.5], [0.5, 0.5]]))
    with pytest.raises(ValueError, match=r"^assignments: .*sum to 1, got a row that sums to 1\.5"):
        metrics.effective_clusters(torch.tensor([[0.5, 0.5], [0.5, 1.0]]))
    with pytest.raises(ValueError, match="sums to 0; apply the softmax first"):
        metrics.effective_clusters(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))


def test_bfloat16_softmax_counts_as_probabilities() -> None:
    logits = torch.randn(512, 128, generator=torch.Generator().manual_seed(12))
    exact = metrics.effective_clusters(logits.softmax(dim=1))
    low = metrics.effective_clusters(logits.softmax(dim=1).bfloat16())
    assert low == pytest.approx(exact, rel=1e-3)


def test_views_of_different_shape() -> None:
    for other in (torch.ones(1, 3), torch.ones(3, 1), torch.eye(4)):
        with pytest.raises(
            ValueError,
            match=r"^assignments0 and assignments1: expected the same shape \(n, K\), got",
        ) as info:
            metrics.agreement(torch.eye(3), other)
        assert str(tuple(other.shape)) in str(info.value)
        assert "(3, 3)" in str(info.value)


BAD_FEATURES: list[tuple[Any, type[Exception], str]] = [
    ([[0.5, 0.5]], TypeError, "torch tensor or numpy array, got list"),
    (torch.eye(3, dtype=torch.int64), TypeError, "floating point .* got dtype torch.int64"),
    (np.eye(3, dtype=np.int32), TypeError, "floating point .* got dtype int32"),
    (np.eye(3, dtype=np.complex64), TypeError, "floating point .* got dtype complex64"),
    (torch.ones(3), ValueError, r"expected shape \(n, d\) .* got \(3,\)"),
    (np.ones((3, 1, 1)), ValueError, r"expected shape \(n, d\) .* got \(3, 1, 1\)"),
    (torch.ones(0, 3), ValueError, r"n >= 1 and d >= 1, got \(0, 3\)"),
    (torch.ones(3, 0), ValueError, r"n >= 1 and d >= 1, got \(3, 0\)"),
    (F / F, ValueError, "finite entries, got 6 NaN or infinite of 9"),
    (np.full((3, 3), np.inf), ValueError, "finite entries, got 9 NaN or infinite of 9"),
]


@pytest.mark.parametrize(("bad", "kind", "message"), BAD_FEATURES)
def test_bad_features(bad: Any, kind: type[Exception], message: str) -> None:
    labels = [0, 0, 1]
    with pytest.raises(kind, match=f"^bank_features: .*{message}"):
        metrics.knn_accuracy(bad, labels, F, labels, 1, 0.1)
    with pytest.raises(kind, match=f"^features: .*{message}"):
        metrics.knn_accuracy(F, labels, bad, labels, 1, 0.1)
    with pytest.raises(kind, match=f"^features: .*{message}"):
        metrics.retrieval_precision(bad, labels, 1)
    with pytest.raises(kind, match=f"^features: .*{message}"):
        metrics.mean_average_precision(bad, labels)


def test_features_and_labels_of_different_length() -> None:
    message = "{0}features and {0}labels: expected one label per row, got 3 rows and 2 labels"
    with pytest.raises(ValueError, match="^" + message.format("bank_")):
        metrics.knn_accuracy(torch.ones(3, 5), [0, 1], F, [0, 1, 2], 1, 0.1)
    with pytest.raises(ValueError, match="^" + message.format("")):
        metrics.knn_accuracy(F, [0, 1, 2], F, [0, 1], 1, 0.1)
    with pytest.raises(ValueError, match="^" + message.format("")):
        metrics.retrieval_precision(F, [0, 1], 1)
    with pytest.raises(ValueError, match="^" + message.format("")):
        metrics.mean_average_precision(F, [0, 1])


def test_features_without_labels() -> None:
    message = (
        r"labels: expected at least one label >= 0, got 3 item\(s\), all unlabelled \(below zero\)"
    )
    with pytest.raises(ValueError, match="^bank_" + message):
        metrics.knn_accuracy(F, [-1] * 3, F, [0] * 3, 1, 0.1)
    with pytest.raises(ValueError, match="^" + message):
        metrics.knn_accuracy(F, [0] * 3, F, [-1] * 3, 1, 0.1)
    with pytest.raises(ValueError, match="^" + message):
        metrics.retrieval_precision(F, [-1] * 3, 1)
    with pytest.raises(ValueError, match="^" + message):
        metrics.mean_average_precision(F, [-1] * 3)


def test_banks_of_different_width() -> None:
    message = r"^bank_features and features: .*columns, got shapes \(3, 3\) and \(3, 2\)$"
    with pytest.raises(ValueError, match=message):
        metrics.knn_accuracy(F, [0] * 3, F[:, :2], [0] * 3, 1, 0.1)


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (0, ValueError, "got 0"),
        (-1, ValueError, "got -1"),
        (3, ValueError, "got 3"),
        (200, ValueError, "got 200"),
        (1.0, TypeError, "got float"),
        ("1", TypeError, "got str"),
        (True, TypeError, "got a bool"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_bad_k(bad: Any, kind: type[Exception], message: str) -> None:
    # Two of three items are labelled in the bank; three are in retrieval, so two others.
    expected = r"^k: expected an integer from 1 to 2 \(the number of labelled items{}\), {}$"
    with pytest.raises(kind, match=expected.format(" in bank_features", message)):
        metrics.knn_accuracy(F, [0, -1, 1], F, [0] * 3, bad, 0.1)
    with pytest.raises(kind, match=expected.format(" minus one", message)):
        metrics.retrieval_precision(F, [0, 0, 1], bad)


@pytest.mark.parametrize("k", [2, np.int64(2), torch.tensor(2)])
def test_largest_k_and_other_integers(k: Any) -> None:
    assert metrics.knn_accuracy(F, [0, -1, 0], F, [0] * 3, k, np.float32(0.1)) == 1.0
    precision = metrics.retrieval_precision(F, [0] * 3, k)
    assert type(precision) is float
    assert precision == 1.0


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (0.0, ValueError, "got 0.0"),
        (-0.1, ValueError, "got -0.1"),
        (math.nan, ValueError, "got nan"),
        (math.inf, ValueError, "got inf"),
        ("0.1", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        (True, TypeError, "got a bool"),
    ],
)
def test_bad_temperature(bad: Any, kind: type[Exception], message: str) -> None:
    expected = f"^temperature: expected a finite number above 0, {message}$"
    with pytest.raises(kind, match=expected):
        metrics.knn_accuracy(F, [0, 1, 2], F, [0, 1, 2], 1, bad)


def test_retrieval_needs_two_items() -> None:
    with pytest.raises(ValueError, match=r"^k: .* from 1 to 0 .*minus one\), got 1$"):
        metrics.retrieval_precision(F[:1], [0], 1)
    message = r"^labels: expected a class with at least two .* got {} labelled item\(s\)"
    with pytest.raises(ValueError, match=message.format(1)):
        metrics.mean_average_precision(F[:1], [0])
    with pytest.raises(ValueError, match=message.format(2)):
        metrics.mean_average_precision(F, [0, 1, -1])


# ---- the module ----


def test_public_names() -> None:
    assert metrics.__all__ == [
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
    for name in metrics.__all__:
        documentation = getattr(metrics, name).__doc__
        for part in ("Formula: `", "Args:", "Returns:", "Raises:", ">>> ", "Source:"):
            assert part in documentation, (name, part)


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("missing", ["sklearn", "scipy", "scipy.optimize", "sklearn.metrics"])
def test_import_without_the_extra(missing: str) -> None:
    # None in sys.modules makes an import fail as if the package were not installed.
    printed = run_python(
        f"""
        import sys
        sys.modules[{missing!r}] = None
        try:
            import c2bin_ext.metrics
        except ImportError as error:
            print(error)
        """
    )
    assert 'pip install "c2bin-ext[eval]"' in printed
    assert missing in printed


def test_the_package_alone_does_not_import_the_extra() -> None:
    printed = run_python(
        """
        import sys
        import c2bin_ext
        print([m for m in ("c2bin_ext.metrics", "sklearn", "scipy") if m in sys.modules])
        """
    )
    assert printed == "[]\n"


def test_rows_of_very_different_length_keep_their_direction() -> None:
    """Squares of 1e-200 and of 1e200 are 0 and inf in float64; cosines do not care."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1e-200, 1.0, 1e200], dtype=torch.float64).repeat(4)[:, None]
    labels = [0, 1, 2, 1, 0, 2, 0, 1, 2, 2, 1, 0]
    plain = metrics.retrieval_precision(features, labels, k=3)
    assert 0 < plain < 1
    assert metrics.retrieval_precision(features * scales, labels, k=3) == plain


def test_a_label_too_few_is_counted() -> None:
    with pytest.raises(ValueError, match="4 rows and 3 labels"):
        metrics.retrieval_precision(torch.eye(4), [0, 1, 2], k=1)
