"""Scores of cluster heads over a validation pass, against scikit-learn and plain loops."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import join
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from c2bin_ext.monitoring import ClusterMonitor, warn_if_more_clusters_than_images

HEADS = (3, 5)
IMAGES = 23


def data(images: int = IMAGES) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Assignments of two views, both heads, and labels of which some are unknown."""
    generator = torch.Generator().manual_seed(3)
    views = []
    for scale in (3.0, 0.6):
        views.append(
            [(scale * torch.randn(images, k, generator=generator)).softmax(dim=1) for k in HEADS]
        )
    other = [(0.5 * a + 0.5 * b) for a, b in zip(*views, strict=True)]
    labels = torch.randint(-1, 4, (images,), generator=generator)
    return views[0], other, labels


def expected(view: list[Tensor], other: list[Tensor], labels: Tensor) -> dict[str, float]:
    """The scores, transcribed from their definitions."""
    scores = {}
    for head, k in enumerate(HEADS):
        rows = view[head].tolist()
        clusters = [row.index(max(row)) for row in rows]
        others = [row.index(max(row)) for row in other[head].tolist()]
        pairs = [(y, c) for y, c in zip(labels.tolist(), clusters, strict=True) if y >= 0]
        truth, found = [y for y, _ in pairs], [c for _, c in pairs]
        table = [[pairs.count((y, c)) for c in range(k)] for y in range(4)]
        row, column = linear_sum_assignment(table, maximize=True)
        mean = [sum(row[j] for row in rows) / len(rows) for j in range(k)]
        result = {
            "nmi": normalized_mutual_info_score(truth, found),
            "ari": adjusted_rand_score(truth, found),
            "acc": sum(table[y][c] for y, c in zip(row, column, strict=True)) / len(pairs),
            "purity": sum(
                max(Counter(y for y, c in pairs if c == cluster).values(), default=0)
                for cluster in range(k)
            )
            / len(pairs),
            "clusters_in_use": len(set(clusters)),
            "effective_clusters": math.exp(-sum(p * math.log(p) for p in mean)),
            "agreement": sum(a == b for a, b in zip(clusters, others, strict=True)) / len(rows),
        }
        scores.update({f"val_{name}_{head}_of_{k}": value for name, value in result.items()})
    return scores


@pytest.mark.parametrize("batch", [1, 4, IMAGES])
def test_scores_are_those_of_all_batches_together(batch: int) -> None:
    view, other, labels = data()
    monitor = ClusterMonitor(HEADS)
    for start in range(0, IMAGES, batch):
        part = slice(start, start + batch)
        monitor.update([a[part] for a in view], labels[part], [a[part] for a in other])
    assert monitor.compute() == pytest.approx(expected(view, other, labels), abs=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_what_pads_a_share_is_not_counted(rank: int, batch: int) -> None:
    view, other, labels = data()
    items = TensorDataset(torch.arange(IMAGES))
    sampler: DistributedSampler[Any] = DistributedSampler(
        items, num_replicas=4, rank=rank, shuffle=False
    )
    share = list(sampler)
    own = list(range(rank, IMAGES, 4))  # 23 images on 4 ranks: the last one repeats an image
    assert share == [*own, *([0] if rank == 3 else [])]

    monitor = ClusterMonitor(HEADS)
    monitor.reset(DataLoader(items, batch_size=batch, sampler=sampler))
    for start in range(0, len(share), batch):
        rows = share[start : start + batch]
        monitor.update([v[rows] for v in view], labels[rows], [o[rows] for o in other])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = monitor.compute()
    wanted = expected([v[own] for v in view], [o[own] for o in other], labels[own])
    assert found == pytest.approx(wanted)


def test_reset_forgets() -> None:
    view, other, labels = data()
    monitor = ClusterMonitor(HEADS)
    monitor.update([a.roll(1, dims=1) for a in view], labels)
    monitor.reset()
    assert monitor.compute() == {}
    monitor.update(view, labels, other)
    assert monitor.compute() == pytest.approx(expected(view, other, labels), abs=1e-6)


def test_without_labels_or_a_second_view_their_scores_are_left_out() -> None:
    view, _, labels = data()
    monitor = ClusterMonitor(HEADS, prefix="x/")
    monitor.update(view, torch.full_like(labels, -1))
    names = {name.split("_")[0] for name in monitor.compute()}
    assert names == {"x/clusters", "x/effective"}
    monitor.reset()
    monitor.update(view, labels)
    assert not any("agreement" in name for name in monitor.compute())


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_and_padding_counts_once(ranks: int, tmp_path: Path) -> None:
    """23 images pad to 24 over 2 and 3 ranks; the scores are those of the 23."""
    mp.spawn(_rank, args=(ranks, str(tmp_path)), nprocs=ranks)
    view, other, labels = data()
    wanted = expected(view, other, labels)
    for rank in range(ranks):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got == pytest.approx(wanted, abs=1e-6)


def _rank(rank: int, ranks: int, folder: str) -> None:
    join(rank, ranks, folder)
    view, other, labels = data()
    dataset = TensorDataset(*view, *other, labels)
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, ranks, rank, shuffle=True, seed=5
    )
    # Batches of another size on each rank: the pass, not the batch, is what is scored.
    loader = DataLoader(dataset, batch_size=2 + rank, sampler=sampler)
    monitor = ClusterMonitor(HEADS)
    monitor.reset(loader)
    for first, second, third, fourth, classes in loader:
        monitor.update([first, second], classes, [third, fourth])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = monitor.compute()
        monitor.reset()
        monitor.update([one_hot([0] * 40, k) for k in HEADS], torch.zeros(40, dtype=torch.long))
        monitor.compute()
    assert len(caught) == (4 if rank == 0 else 0)  # two heads, each onto one cluster
    torch.save(scores, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def one_hot(clusters: list[int], k: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(clusters), k).float()


def scored(assignments: Tensor, monitor: ClusterMonitor | None = None) -> list[str]:
    monitor = ClusterMonitor([assignments.shape[1]]) if monitor is None else monitor
    monitor.reset()
    monitor.update([assignments], torch.zeros(len(assignments), dtype=torch.long))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor.compute()
    return [str(warning.message) for warning in caught]


def test_a_collapse_onto_few_clusters_is_said() -> None:
    (message,) = scored(one_hot([4] * 38 + [5] * 2, 40))
    effective = math.exp(-0.95 * math.log(0.95) - 0.05 * math.log(0.05))
    assert message == (
        "Cluster head 0 of 40 clusters has collapsed: 2 of its clusters hold an image and "
        f"{effective:.1f} are effectively in use. A larger entropy_weight spreads images over "
        "clusters."
    )


def test_a_collapse_onto_one_cluster_is_said() -> None:
    messages = scored(one_hot([4] * 40, 40))
    assert len(messages) == 2  # few clusters, and the same assignment for all


def test_a_collapse_onto_uniform_assignments_is_said() -> None:
    nearly = torch.full((40, 10), 0.1) + 1e-4 * one_hot([i % 10 for i in range(40)], 10)
    (message,) = scored(nearly / nearly.sum(dim=1, keepdim=True))
    assert message == (
        "Cluster head 0 of 10 clusters has collapsed: nearly the same assignment comes out for "
        "every image. A smaller entropy_weight or temperature lets assignments become definite."
    )


@pytest.mark.parametrize(
    "clusters", [list(range(10)) * 2, [0] * 8 + [1] * 8 + [2] * 4], ids=["all", "three of ten"]
)
def test_a_head_in_use_is_not_complained_of(clusters: list[int]) -> None:
    assert scored(one_hot(clusters, 10)) == []


def test_more_clusters_than_images_is_no_collapse() -> None:
    assert scored(one_hot([3, 1, 2, 0], 100)) == []


def test_a_collapse_is_said_once_until_the_head_recovers() -> None:
    monitor = ClusterMonitor([40])
    bad, good = one_hot([4] * 38 + [5] * 2, 40), one_hot(list(range(40)), 40)
    assert [len(scored(a, monitor)) for a in (bad, bad, bad, good, bad)] == [1, 0, 0, 0, 1]


def test_one_image_is_no_collapse() -> None:
    assert scored(one_hot([3], 100)) == []


def test_two_images_with_one_assignment_are() -> None:
    assert len(scored(torch.full((2, 2), 0.5))) == 2
    assert len(scored(torch.full((2, 3), 1 / 3))) == 2


@pytest.mark.parametrize(("used", "said"), [(5, 0), (4, 1)])
def test_a_tenth_of_the_clusters_is_enough(used: int, said: int) -> None:
    # 41 clusters: 1 + 0.1 * (41 - 1) = 5 in use, evenly so that as many are effective.
    assert len(scored(one_hot([i % used for i in range(60)], 41))) == said


def test_warnings_point_at_the_caller() -> None:
    monitor = ClusterMonitor([40])
    monitor.update([one_hot([4] * 38 + [5] * 2, 40)], torch.zeros(40, dtype=torch.long))
    with pytest.warns(UserWarning, match="has collapsed") as caught:
        monitor.compute()
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="A head has 65") as caught:
        warn_if_more_clusters_than_images((65, 8), 64)
    assert caught[0].filename == __file__


def test_class_zero_is_a_label() -> None:
    monitor = ClusterMonitor([4])
    monitor.update([one_hot([0, 1, 2, 3], 4)], torch.zeros(4, dtype=torch.long))
    assert monitor.compute()["val_purity_0_of_4"] == 1.0


def test_more_clusters_than_images_in_a_batch() -> None:
    with pytest.warns(UserWarning, match="A head has 65") as caught:
        warn_if_more_clusters_than_images((65, 8), 64)
    assert str(caught[0].message) == (
        "A head has 65 clusters but a global batch has 64 images: most clusters get no image in a "
        "batch, which makes their contrast noisy. Use a larger batch or fewer clusters."
    )
    with pytest.warns(UserWarning, match="a global batch has 1 images"):
        warn_if_more_clusters_than_images([2], 1)
    with pytest.raises(ValueError, match=r"^batch_size: expected an int >= 1, got 0"):
        warn_if_more_clusters_than_images([2], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_more_clusters_than_images((64, 8), 64)


PER_HEAD = "expected one tensor per head of shapes [(23, 3), (23, 5)], got "
LABELS = "labels: expected integers of shape (n,), below zero if unlabelled, got "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, y: ([a[0]], y), f"assignments: {PER_HEAD}[(23, 3)]"),
        (lambda a, y: ([a[1], a[0]], y), f"assignments: {PER_HEAD}[(23, 5), (23, 3)]"),
        (
            lambda a, y: (a, y[1:]),
            "assignments: expected one tensor per head of shapes [(22, 3), (22, 5)], got "
            "[(23, 3), (23, 5)]",
        ),
        (lambda a, y: (a, y, a[:1]), f"other_view: {PER_HEAD}[(23, 3)]"),
        (lambda a, y: (a, y.float()), f"{LABELS}torch.float32 of shape (23,)"),
        (lambda a, y: (a, y[:, None]), f"{LABELS}torch.int64 of shape (23, 1)"),
        (lambda a, y: (a, y > 0), f"{LABELS}torch.bool of shape (23,)"),
    ],
)
def test_wrong_shapes_and_types(change: Any, message: str) -> None:
    view, _, labels = data()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ClusterMonitor(HEADS).update(*change(view, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a, y: ([a[0], a[1] * torch.nan], y),
            "assignments of head 1 of 5 clusters: expected finite values, got 115 NaN",
        ),
        (
            lambda a, y: (a, y, [a[0] / 0, a[1]]),
            "other_view of head 0 of 3 clusters: expected finite values",
        ),
        (
            lambda a, y: ([a[0], a[1].log()], y),
            "assignments of head 1 of 5 clusters: expected va",
        ),
        (lambda a, y: ([2 * a[0], a[1]], y), "assignments of head 0 of 3 .* rows that sum to 1"),
    ],
)
def test_wrong_input(change: Any, message: str) -> None:
    view, _, labels = data()
    with pytest.raises(ValueError, match=message):
        ClusterMonitor(HEADS).update(*change(view, labels))


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (("cat", "dog"), "[str, str]"),
        (["cat"] * 23, "[str, str, str, str, …]"),
        ([0] * 23, "[int, int, int, int, …]"),
        (None, "NoneType"),
    ],
)
def test_labels_that_are_no_tensor(labels: Any, got: str) -> None:
    view, _, _ = data()
    expected = r"^labels: expected a tensor of integers \(n,\), below zero if unlabelled, got "
    with pytest.raises(TypeError, match=f"{expected}{re.escape(got)}$"):
        ClusterMonitor(HEADS).update(view, labels)


def test_nan_in_a_later_batch_names_the_head() -> None:
    view, _, labels = data()
    monitor = ClusterMonitor(HEADS)
    monitor.update(view, labels)
    monitor.update([view[0], view[1] * torch.nan], labels)
    with pytest.raises(ValueError, match="mean assignment of head 1 of 5 clusters: expected finit"):
        monitor.compute()


def test_a_second_view_now_and_then_is_an_error() -> None:
    view, other, labels = data()
    monitor = ClusterMonitor(HEADS)
    monitor.update(view, labels)
    with pytest.raises(ValueError, match=r"^other_view: expected for every batch of a pass or for"):
        monitor.update(view, labels, other)


def test_nothing_is_kept_for_the_gradient() -> None:
    view, _, labels = data()
    monitor = ClusterMonitor(HEADS)
    monitor.update([a.requires_grad_() for a in view], labels)
    assert all(math.isfinite(value) for value in monitor.compute().values())
