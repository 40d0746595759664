"""Scores of frozen features: against loops, and what they refuse."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightly")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from experiments import evaluation

sys.path.pop(0)


class TestEvaluation:
    @staticmethod
    def blobs(n: int, seed: int, noise: float = 0.3) -> evaluation.Features:
        draw = torch.Generator().manual_seed(seed)
        labels = torch.arange(n) % 3
        return evaluation.Features(
            torch.eye(3)[labels] + noise * torch.randn(n, 3, generator=draw), labels
        )

    def test_extract_is_in_evaluation_mode_and_puts_the_mode_back(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
        model[2].eval()
        images, labels = torch.randn(6, 3, 4, 4), torch.arange(6)
        batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
        before = copy.deepcopy(model.state_dict())
        found = evaluation.extract(model, batches)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert model.training
        assert model[1].training
        assert not model[2].training
        assert torch.equal(found.labels, labels)
        torch.testing.assert_close(found.features, model.eval()(images).flatten(start_dim=1))

    def test_extract_of_nothing_says_so(self, complains: Any) -> None:
        with complains(ValueError, "batches", "empty"):
            evaluation.extract(nn.Flatten(), [], device="cpu")

    @pytest.mark.parametrize("chunk", [7, 512])
    def test_knn_agrees_with_a_loop(self, chunk: int) -> None:
        train, test = self.blobs(60, 0, noise=0.6), self.blobs(31, 1, noise=0.6)
        right = 0
        for row, label in zip(test.features, test.labels, strict=True):
            cosines = torch.cosine_similarity(row[None], train.features)
            near = cosines.argsort(descending=True)[:5]
            votes = [
                float((cosines[near] / 0.1).exp()[train.labels[near] == c].sum()) for c in range(3)
            ]
            right += votes.index(max(votes)) == int(label)
        assert 0 < right < 31
        assert evaluation.knn_accuracy(train, test, k=5, chunk=chunk) == pytest.approx(right / 31)

    def test_knn_is_cut_to_the_bank(self) -> None:
        train, test = self.blobs(9, 0), self.blobs(12, 1)
        assert evaluation.knn_accuracy(train, test, k=200) == evaluation.knn_accuracy(
            train, test, k=9
        )

    def test_linear_probe_learns_and_leaves_the_generators_alone(self) -> None:
        train, test = self.blobs(90, 0), self.blobs(60, 1)
        torch.manual_seed(3)
        state = torch.get_rng_state()
        probe = evaluation.linear_probe(train, test)
        assert torch.equal(torch.get_rng_state(), state)
        assert probe.accuracy > 0.9
        assert probe == evaluation.linear_probe(train, test)

    def test_linear_probe_never_looks_at_the_test_images_to_choose(self) -> None:
        train, test = self.blobs(90, 0), self.blobs(60, 1)
        wrong = evaluation.Features(test.features, (test.labels + 1) % 3)
        honest, fooled = (evaluation.linear_probe(train, t, epochs=5) for t in (test, wrong))
        assert (honest.lr, honest.held_out_accuracy) == (fooled.lr, fooled.held_out_accuracy)
        assert fooled.accuracy < 0.2 < honest.accuracy

    def test_kmeans_clusters_the_test_images_and_scores_them(self) -> None:
        train, test = self.blobs(90, 0, noise=0.1), self.blobs(60, 1, noise=0.1)
        clusters = evaluation.kmeans(train, test, k=3)
        scores = evaluation.clustering_scores(test.labels, clusters)
        assert scores == {"nmi": 1.0, "acc": 1.0, "purity": 1.0, "ari": 1.0, "in_use": 3.0}
        # Length says nothing: features are normalised first.
        longer = evaluation.Features(
            test.features * torch.linspace(1, 50, 60)[:, None], test.labels
        )
        assert torch.equal(evaluation.kmeans(train, longer, k=3), clusters)

    @pytest.mark.parametrize("side", ["train", "test"])
    @pytest.mark.parametrize("score", ["knn_accuracy", "linear_probe", "kmeans"])
    def test_what_cannot_be_scored_is_refused(self, side: str, score: str, complains: Any) -> None:
        options = {"knn_accuracy": {"k": 5}, "linear_probe": {"epochs": 1}, "kmeans": {"k": 3}}
        given = {"train": self.blobs(30, 0), "test": self.blobs(12, 1)}
        good = given[side]
        features, labels = good.features.clone(), good.labels.clone()
        features[3, 1], labels[5] = float("nan"), -1
        compute = getattr(evaluation, score)
        given[side] = evaluation.Features(features, good.labels)
        with complains(ValueError, side, "finite", f"1 of {len(labels)} rows"):
            compute(**given, **options[score])
        given[side] = evaluation.Features(good.features, labels)
        if score == "kmeans":  # which reads no labels
            assert len(compute(**given, **options[score])) == 12
            return
        with complains(ValueError, side, "class", f"1 of {len(labels)} below 0"):
            compute(**given, **options[score])

    def test_unlabelled_images_are_left_out_of_clustering_scores(self) -> None:
        labels, clusters = torch.tensor([0, 0, 1, -1]), torch.tensor([5, 5, 2, 2])
        assert evaluation.clustering_scores(labels, clusters)["purity"] == 1.0
