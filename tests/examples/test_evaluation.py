"""examples/experiments/evaluation.py: scores against loops, and refusals of what has no score."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments.evaluation import (
    Features,
    cluster_scores,
    extract,
    kmeans,
    lightly_knn,
    linear_probe,
)
from experiments.paper.probe import linear_evaluation
from experiments.report import HEAD, cells, markdown
from torch import nn

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def blobs(n: int, seed: int, noise: float = 0.3) -> Features:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return Features(torch.eye(3)[labels] + noise * torch.randn(n, 3, generator=draw), labels)


def test_extract_is_in_evaluation_mode_and_puts_the_mode_back() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 5), nn.BatchNorm1d(5))
    model[3].eval()
    images, labels = torch.randn(6, 3, 4, 4), torch.arange(6)
    before = copy.deepcopy(model.state_dict())
    found = extract(model, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [module.training for module in model] == [True, True, True, False]
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.features, model.eval()(images))
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        extract(nn.Flatten(), [], device="cpu")


@pytest.mark.parametrize("chunk", [7, 512])
def test_knn_agrees_with_a_loop(chunk: int) -> None:
    train, test = blobs(60, 0, noise=0.6), blobs(31, 1, noise=0.6)
    right = 0
    for row, label in zip(test.features, test.labels, strict=True):
        cosines = torch.cosine_similarity(row[None], train.features)
        near = cosines.argsort(descending=True)[:5]
        weights = (cosines[near] / 0.1).exp()
        votes = [float(weights[train.labels[near] == c].sum()) for c in range(3)]
        right += votes.index(max(votes)) == int(label)
    assert 0 < right < 31
    assert lightly_knn(train, test, k=5, chunk=chunk) == pytest.approx(right / 31)
    # k is cut to the bank.
    assert lightly_knn(train, test, k=200) == lightly_knn(train, test, k=60)


def test_linear_probe_learns_and_leaves_the_generators_alone() -> None:
    train, test = blobs(90, 0), blobs(60, 1)
    state = torch.get_rng_state()
    probe = linear_probe(train, test)
    assert torch.equal(torch.get_rng_state(), state)
    assert probe.accuracy > 0.9
    assert probe == linear_probe(train, test)


def test_linear_probe_never_looks_at_the_test_images_to_choose() -> None:
    train, test = blobs(90, 0), blobs(60, 1)
    wrong = Features(test.features, (test.labels + 1) % 3)
    honest, fooled = (linear_probe(train, t, epochs=5) for t in (test, wrong))
    assert (honest.lr, honest.held_out_accuracy) == (fooled.lr, fooled.held_out_accuracy)
    assert fooled.accuracy < 0.2 < honest.accuracy


def test_kmeans_clusters_the_test_images_and_scores_them() -> None:
    train, test = blobs(90, 0, noise=0.1), blobs(60, 1, noise=0.1)
    clusters = kmeans(train, test, k=3)
    scores = cluster_scores(test.labels, clusters)
    assert scores.pop("effective_clusters") == pytest.approx(3.0)
    perfect = {"nmi": 1.0, "acc": 1.0, "purity": 1.0, "ari": 1.0}
    assert scores == perfect | {"clusters_in_use": 3.0}
    # Length says nothing: features are normalised first.
    longer = Features(test.features * torch.linspace(1, 50, 60)[:, None], test.labels)
    assert torch.equal(kmeans(train, longer, k=3), clusters)
    for k in (0, 91):
        with pytest.raises(ValueError, match=f"k: expected 1 to 90, the training images, got {k}"):
            kmeans(train, test, k=k)


GOOD = blobs(12, 0)
NAN = Features(GOOD.features.clone().index_fill_(0, torch.tensor([3]), torch.nan), GOOD.labels)
UNLABELLED = Features(GOOD.features, GOOD.labels.clone().index_fill_(0, torch.tensor([2]), -1))
EMPTY = Features(GOOD.features[:0], GOOD.labels[:0])
SHORT = Features(GOOD.features, GOOD.labels[:5])
SCORERS: dict[str, Any] = {
    "knn": lambda train, test: lightly_knn(train, test, k=5),
    "probe": lambda train, test: linear_probe(train, test, epochs=1),
    "table6": lambda train, test: linear_evaluation(train, test, epochs=1),
    "kmeans": lambda train, test: kmeans(train, test, k=2),
}


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("where", ["train", "test"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (NAN, "expected finite features, got 3 NaN or infinite entries"),
        (UNLABELLED, "expected labels of at least 0, got 1 below"),
        (EMPTY, "expected at least one image, got none"),
        (SHORT, r"expected features \(n, d\) and labels \(n,\), got shapes \(12, 3\) and \(5,\)"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    scorer: str, where: str, bad: Features, message: str
) -> None:
    parts = {"train": GOOD, "test": GOOD, where: bad}
    if scorer == "kmeans" and any(bad is part for part in (UNLABELLED, SHORT)):  # reads no labels
        assert len(kmeans(parts["train"], parts["test"], k=2)) == 12
        return
    with pytest.raises(ValueError, match=f"{where}: {message}"):
        SCORERS[scorer](parts["train"], parts["test"])


@pytest.mark.parametrize("name", ["decisions", "many_clusters", "epochs50_cifar10", "together"])
def test_published_numbers_still_make_their_tables(name: str) -> None:
    """They were written by earlier versions of these commands."""
    choices = json.loads((RESULTS / f"{name}.json").read_text())["choices"]
    body = [[row["row"], *cells(list(row["results"].values()))] for row in choices]
    assert markdown(["C2BIN", *HEAD], body) in (RESULTS / f"{name}.md").read_text()
