"""Every equation against the oracle, against closed forms, and against wrong input."""

from __future__ import annotations

import itertools
import math
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import random_assignments, random_embeddings, rows
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from c2bin_ext import C2BINLoss, functional

SIZES = list(itertools.product([1, 2, 7], [2, 3, 8]))
CONTRAST_OPTIONS = [
    {"similarity": s, "positive_in_denominator": p, "symmetric": d}
    for s, p, d in itertools.product(["cosine", "dot"], [True, False], [True, False])
]
OBJECTIVE_OPTIONS = [
    {**contrast, "reduction": reduction, "symmetric_alignment": aligned}
    for contrast, reduction, aligned in itertools.product(
        CONTRAST_OPTIONS, ["mean", "sum"], [True, False]
    )
]
HEADS = (2, 5, 3)


def label(options: Any) -> str | None:
    if isinstance(options, dict):
        return "-".join(str(value) for value in options.values())
    return None


def gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs))


def same(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def views(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    first, second = random_assignments(n, k, seed), random_assignments(n, k, seed + 1000)
    return first.requires_grad_(), second.requires_grad_()


def shuffle(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def objective_inputs(n: int = 4, d: int = 3, heads: tuple[int, ...] = HEADS) -> tuple[Any, ...]:
    """Predictions, targets and the assignments of both views, all float64 leaves."""
    predictions = tuple(random_embeddings(n, d, seed).requires_grad_() for seed in (1, 2))
    targets = tuple(random_embeddings(n, d, seed) for seed in (3, 4))
    assignments = tuple(
        tuple(random_assignments(n, k, seed + k).requires_grad_() for k in heads)
        for seed in (10, 20)
    )
    return predictions, targets, assignments


def objective_oracle(inputs: tuple[Any, ...], **options: Any) -> tuple[float, ...]:
    predictions, targets, assignments = inputs
    return oracle.total(
        [rows(view) for view in predictions],
        [rows(view) for view in targets],
        [[rows(head) for head in view] for view in assignments],
        **options,
    )


class TestOracle:
    """The oracle itself, on numbers small enough for a pencil."""

    def test_alignment(self) -> None:
        assert oracle.alignment([[3.0, 4.0]], [[1.0, 0.0]]) == pytest.approx(1 - 0.6)

    def test_contrast_is_from_view_0_to_view_1(self) -> None:
        # c'_1 = 1/4, c'_2 = 3/4; c''_1 = 1/8, c''_2 = 7/8; tau = 1/2.
        value = oracle.contrast([[0.25, 0.75]], [[0.125, 0.875]], similarity="dot", symmetric=False)
        first = math.log(math.exp(1 / 16) + math.exp(7 / 16)) - 1 / 16
        second = math.log(math.exp(3 / 16) + math.exp(21 / 16)) - 21 / 16
        assert value == pytest.approx((first + second) / 2)

    def test_contrast_without_the_positive(self) -> None:
        value = oracle.contrast(
            [[0.25, 0.75]],
            [[0.125, 0.875]],
            similarity="dot",
            symmetric=False,
            positive_in_denominator=False,
        )
        assert value == pytest.approx((7 / 16 - 1 / 16 + 3 / 16 - 21 / 16) / 2)

    def test_entropy(self) -> None:
        value = oracle.entropy_regularizer([[0.5, 0.5], [0.0, 1.0]], reduction="sum")
        entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
        assert value == pytest.approx(2 * (math.log(2) - entropy))


class TestAlignment:
    @pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 4), (2, 3), (7, 8)])
    def test_value(self, n: int, d: int) -> None:
        prediction, target = random_embeddings(n, d, 1), random_embeddings(n, d, 2)
        value = functional.bootstrap_alignment_loss(prediction, target)
        assert value.shape == ()
        same(value, oracle.alignment(rows(prediction), rows(target)))

    @pytest.mark.parametrize(("n", "d"), [(1, 4), (7, 8)])
    def test_gradient(self, n: int, d: int) -> None:
        prediction, target = random_embeddings(n, d, 1), random_embeddings(n, d, 2)
        prediction.requires_grad_()
        (actual,) = gradients(functional.bootstrap_alignment_loss(prediction, target), prediction)
        expected = oracle.finite_differences(
            lambda matrix: oracle.alignment(matrix, rows(target)), rows(prediction)
        )
        same(actual, expected, 1e-8)

    def test_gradcheck(self) -> None:
        target = random_embeddings(4, 3, 2)
        prediction = random_embeddings(4, 3, 1).requires_grad_()

        def function(p: Tensor) -> Tensor:
            return functional.bootstrap_alignment_loss(p, target)

        assert gradcheck(function, (prediction,))
        assert gradgradcheck(function, (prediction,))

    @pytest.mark.parametrize(("factor", "expected"), [(2.0, 0.0), (-0.5, 2.0)])
    def test_parallel_and_opposite(self, factor: float, expected: float) -> None:
        target = random_embeddings(5, 3)
        same(functional.bootstrap_alignment_loss(factor * target, target), expected)

    def test_orthogonal_is_one(self) -> None:
        prediction = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        same(functional.bootstrap_alignment_loss(prediction, prediction.flip(1)), 1.0)

    def test_mean_over_instances_not_over_the_whole_matrix(self) -> None:
        prediction = torch.tensor([[100.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        target = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
        same(functional.bootstrap_alignment_loss(prediction, target), 1.0)

    def test_no_gradient_to_the_target(self) -> None:
        prediction = random_embeddings(4, 3, 1).requires_grad_()
        target = random_embeddings(4, 3, 2).requires_grad_()
        functional.bootstrap_alignment_loss(prediction, target).backward()
        assert target.grad is None
        assert prediction.grad is not None

    def test_shared_leaf_only_gets_the_gradient_of_the_prediction(self) -> None:
        leaf = random_embeddings(4, 3, 1).requires_grad_()
        (shared,) = gradients(functional.bootstrap_alignment_loss(leaf, 2 * leaf + 1), leaf)
        (alone,) = gradients(
            functional.bootstrap_alignment_loss(leaf, (2 * leaf + 1).detach()), leaf
        )
        same(shared, alone)

    @pytest.mark.parametrize("which", ["prediction", "target"])
    def test_zero_vector_has_cosine_and_gradient_zero(self, which: str) -> None:
        inputs = {"prediction": random_embeddings(3, 4, 1), "target": random_embeddings(3, 4, 2)}
        inputs[which][1] = 0.0
        prediction = inputs["prediction"].requires_grad_()
        value = functional.bootstrap_alignment_loss(prediction, inputs["target"])
        same(value, oracle.alignment(rows(prediction), rows(inputs["target"])))
        (gradient,) = gradients(value, prediction)
        assert torch.all(gradient[1] == 0)
        assert torch.all(gradient[[0, 2]].abs().sum(dim=1) > 0)

    @given(exponent=st.floats(-20, 20), side=st.sampled_from(["prediction", "target", "both"]))
    def test_scale_invariance_in_float32(self, exponent: float, side: str) -> None:
        prediction = random_embeddings(4, 3, 1, torch.float32)
        target = random_embeddings(4, 3, 2, torch.float32)
        expected = functional.bootstrap_alignment_loss(prediction, target)
        scale = 10.0**exponent
        scaled = functional.bootstrap_alignment_loss(
            prediction * (scale if side != "target" else 1.0),
            target * (scale if side != "prediction" else 1.0),
        )
        torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
    def test_gradient_scales_inversely_in_float32(self, scale: float) -> None:
        target = random_embeddings(4, 3, 2, torch.float32)
        prediction = random_embeddings(4, 3, 1, torch.float32)
        small = (prediction * scale).requires_grad_()
        prediction.requires_grad_()
        (expected,) = gradients(functional.bootstrap_alignment_loss(prediction, target), prediction)
        (actual,) = gradients(functional.bootstrap_alignment_loss(small, target), small)
        torch.testing.assert_close(actual * scale, expected, rtol=1e-4, atol=1e-6)


class TestClusterAssignments:
    @pytest.mark.parametrize("n", [1, 2, 7])
    @pytest.mark.parametrize("num_clusters", [(2,), (2, 5, 3), [3, 3]])
    def test_value(self, n: int, num_clusters: tuple[int, ...]) -> None:
        logits = 3 * random_embeddings(n, sum(num_clusters))
        result = functional.cluster_assignments(logits, num_clusters)
        assert isinstance(result, tuple)
        assert [tuple(head.shape) for head in result] == [(n, k) for k in num_clusters]
        start = 0
        for head, k in zip(result, num_clusters, strict=True):
            same(head, oracle.memberships(rows(logits[:, start : start + k])))
            start += k

    def test_gradcheck(self) -> None:
        logits = random_embeddings(3, 5).requires_grad_()
        assert gradcheck(lambda x: functional.cluster_assignments(x, (2, 3)), (logits,))
        assert gradgradcheck(lambda x: functional.cluster_assignments(x, (2, 3)), (logits,))

    def test_columns_are_the_batch_wise_vectors(self) -> None:
        (head,) = functional.cluster_assignments(random_embeddings(4, 3), (3,))
        same(head[:, 2], oracle.bca(rows(head), 2))


class TestContrast:
    @pytest.mark.parametrize("options", CONTRAST_OPTIONS, ids=label)
    @pytest.mark.parametrize(("n", "k"), SIZES)
    @pytest.mark.parametrize("temperature", [0.5, 0.07])
    def test_value_and_gradient(
        self, n: int, k: int, temperature: float, options: dict[str, Any]
    ) -> None:
        options = {**options, "temperature": temperature}
        first, second = views(n, k)
        value = functional.bca_contrastive_loss(first, second, **options)
        assert value.shape == ()
        same(value, oracle.contrast(rows(first), rows(second), **options), 1e-11)

        actual = gradients(value, first, second)
        expected = (
            oracle.finite_differences(
                lambda matrix: oracle.contrast(matrix, rows(second), **options), rows(first)
            ),
            oracle.finite_differences(
                lambda matrix: oracle.contrast(rows(first), matrix, **options), rows(second)
            ),
        )
        for got, wanted in zip(actual, expected, strict=True):
            same(got, wanted, 1e-6)

    @pytest.mark.parametrize("options", CONTRAST_OPTIONS, ids=label)
    def test_gradcheck(self, options: dict[str, Any]) -> None:
        def function(first: Tensor, second: Tensor) -> Tensor:
            return functional.bca_contrastive_loss(first, second, **options)

        assert gradcheck(function, views(4, 3))
        assert gradgradcheck(function, views(4, 3))

    @pytest.mark.parametrize("options", CONTRAST_OPTIONS, ids=label)
    @pytest.mark.parametrize("side", [0, 1])
    def test_gradient_when_only_one_view_needs_it(self, side: int, options: dict[str, Any]) -> None:
        both = views(5, 4)
        expected = gradients(functional.bca_contrastive_loss(*both, **options), *both)[side]
        detached = [view.detach() for view in both]
        detached[side].requires_grad_()
        (actual,) = gradients(functional.bca_contrastive_loss(*detached, **options), detached[side])
        same(actual, expected)

    @pytest.mark.parametrize("options", CONTRAST_OPTIONS, ids=label)
    def test_gradient_when_both_views_are_one_tensor(self, options: dict[str, Any]) -> None:
        (view, _) = views(5, 4)
        (actual,) = gradients(functional.bca_contrastive_loss(view, view, **options), view)
        expected = oracle.finite_differences(
            lambda matrix: oracle.contrast(matrix, matrix, **options), rows(view)
        )
        same(actual, expected, 1e-7)

    def test_gradient_follows_the_incoming_one(self) -> None:
        first, second = views(5, 4)
        value = functional.bca_contrastive_loss(first, second)
        plain = torch.autograd.grad(value, first, retain_graph=True)[0]
        same(torch.autograd.grad(-3.0 * value, first)[0], -3.0 * plain)

    def test_non_contiguous_input(self) -> None:
        first, second = views(6, 4)
        value = functional.bca_contrastive_loss(first.t().contiguous().t(), second[:, :])
        same(value, oracle.contrast(rows(first), rows(second)))

    def test_inputs_are_left_alone(self) -> None:
        first, second = views(6, 4)
        copies = first.detach().clone(), second.detach().clone()
        functional.bca_contrastive_loss(first, second).backward()
        assert torch.equal(first, copies[0])
        assert torch.equal(second, copies[1])

    @pytest.mark.parametrize("k", [2, 3, 8])
    @pytest.mark.parametrize("per_cluster", [1, 3])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("t", [0.5, 0.1])
    def test_perfect_agreement(self, k: int, per_cluster: int, symmetric: bool, t: float) -> None:
        view = oracle.one_hot(per_cluster * k, k)
        options: dict[str, Any] = {"temperature": t, "symmetric": symmetric}
        cosine = functional.bca_contrastive_loss(view, view, **options)
        same(cosine, math.log(math.exp(1 / t) + k - 1) - 1 / t)
        cosine_left_out = functional.bca_contrastive_loss(
            view, view, positive_in_denominator=False, **options
        )
        same(cosine_left_out, math.log(k - 1) - 1 / t)
        dot = functional.bca_contrastive_loss(view, view, similarity="dot", **options)
        m = per_cluster
        same(dot, math.log(math.exp(m / t) + k - 1) - m / t)
        dot_left_out = functional.bca_contrastive_loss(
            view, view, similarity="dot", positive_in_denominator=False, **options
        )
        same(dot_left_out, math.log(k - 1) - m / t)

    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    @pytest.mark.parametrize(("n", "k"), SIZES)
    def test_uniform(self, n: int, k: int, similarity: str) -> None:
        view = oracle.uniform(n, k)
        same(functional.bca_contrastive_loss(view, view, similarity=similarity), math.log(k))
        left_out = functional.bca_contrastive_loss(
            view, view, similarity=similarity, positive_in_denominator=False
        )
        same(left_out, math.log(k - 1))

    @pytest.mark.parametrize(("n", "k"), SIZES)
    def test_collapsed(self, n: int, k: int) -> None:
        view, t = oracle.collapsed(n, k), 0.5
        alive = math.log(math.exp(1 / t) + k - 1) - 1 / t
        same(functional.bca_contrastive_loss(view, view), (alive + (k - 1) * math.log(k)) / k)
        left_out = functional.bca_contrastive_loss(view, view, positive_in_denominator=False)
        same(left_out, math.log(k - 1) - 1 / t / k)
        alive = math.log(math.exp(n / t) + k - 1) - n / t
        dot = functional.bca_contrastive_loss(view, view, similarity="dot")
        same(dot, (alive + (k - 1) * math.log(k)) / k)

    @pytest.mark.parametrize("positive", [True, False])
    def test_dead_column_has_cosine_and_gradient_zero(self, positive: bool) -> None:
        first = oracle.dead_cluster(5, 4, 0).requires_grad_()
        second = random_assignments(5, 4, 1).requires_grad_()
        options = {"positive_in_denominator": positive}
        value = functional.bca_contrastive_loss(first, second, **options)
        same(value, oracle.contrast(rows(first), rows(second), **options))
        on_first, on_second = gradients(value, first, second)
        assert torch.all(on_first[:, -1] == 0)
        expected = oracle.finite_differences(
            lambda matrix: oracle.contrast(
                [[*row[:-1], 0.0] for row in matrix], rows(second), **options
            ),
            rows(first),
        )
        same(on_first[:, :-1], torch.tensor(expected)[:, :-1].tolist(), 1e-7)
        expected = oracle.finite_differences(
            lambda matrix: oracle.contrast(rows(first), matrix, **options), rows(second)
        )
        same(on_second, expected, 1e-7)

    def test_defaults_are_the_documented_ones(self) -> None:
        first, second = views(6, 4)
        same(
            functional.bca_contrastive_loss(first, second),
            functional.bca_contrastive_loss(
                first,
                second,
                temperature=0.5,
                similarity="cosine",
                positive_in_denominator=True,
                symmetric=True,
            ),
        )

    @given(
        n=st.integers(1, 12),
        k=st.integers(2, 9),
        seed=st.integers(0, 10_000),
        options=st.sampled_from(CONTRAST_OPTIONS),
    )
    def test_permutations_and_swaps(
        self, n: int, k: int, seed: int, options: dict[str, Any]
    ) -> None:
        first, second = views(n, k, seed)
        value = functional.bca_contrastive_loss(first, second, **options)
        instances, clusters = shuffle(n, seed), shuffle(k, seed + 1)
        permuted = functional.bca_contrastive_loss(first[instances], second[instances], **options)
        same(permuted, value.item(), 1e-11)
        relabelled = functional.bca_contrastive_loss(
            first[:, clusters], second[:, clusters], **options
        )
        same(relabelled, value.item(), 1e-11)
        swapped = functional.bca_contrastive_loss(second, first, **options)
        other = {**options, "symmetric": False}
        mean = (
            functional.bca_contrastive_loss(first, second, **other)
            + functional.bca_contrastive_loss(second, first, **other)
        ) / 2
        if options["symmetric"]:
            same(swapped, value.item(), 1e-11)
            same(value, mean.item(), 1e-11)
        else:
            same((value + swapped) / 2, mean.item(), 1e-11)

    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    def test_one_direction_is_not_the_other(self, similarity: str) -> None:
        first, second = views(5, 4)
        options: dict[str, Any] = {"similarity": similarity, "symmetric": False}
        there = functional.bca_contrastive_loss(first, second, **options)
        back = functional.bca_contrastive_loss(second, first, **options)
        assert abs(there.item() - back.item()) > 1e-4

    def test_relabelling_one_view_only_changes_the_loss(self) -> None:
        first, second = views(5, 4)
        value = functional.bca_contrastive_loss(first, second)
        assert (
            abs(value.item() - functional.bca_contrastive_loss(first, second.flip(1)).item()) > 1e-4
        )

    @pytest.mark.parametrize("positive", [True, False])
    def test_cosine_ignores_the_scale_of_a_column(self, positive: bool) -> None:
        first, second = views(5, 4)
        scales = torch.tensor([1e-6, 0.5, 3.0, 1e6], dtype=torch.float64)
        scaled = functional.bca_contrastive_loss(
            first * scales, second * scales.flip(0), positive_in_denominator=positive
        )
        plain = functional.bca_contrastive_loss(first, second, positive_in_denominator=positive)
        same(scaled, plain.item())

    def test_dot_does_not_ignore_the_scale(self) -> None:
        first, second = views(5, 4)
        plain = functional.bca_contrastive_loss(first, second, similarity="dot")
        scaled = functional.bca_contrastive_loss(2 * first, second, similarity="dot")
        assert abs(plain.item() - scaled.item()) > 1e-3

    def test_cosine_ignores_repetition_of_the_batch(self) -> None:
        first, second = views(5, 4)
        twice = functional.bca_contrastive_loss(first.repeat(2, 1), second.repeat(2, 1))
        same(twice, functional.bca_contrastive_loss(first, second).item())

    def test_as_printed_it_cannot_tell_balance_from_collapse(self) -> None:
        """Why the printed form needs its entropy term, and its positive: see the Decisions page."""
        n, k = 24, 6
        balanced = torch.eye(k).repeat(n // k, 1)
        collapsed = torch.eye(k)[:1].repeat(n, 1)
        options = {"similarity": "dot", "symmetric": False}

        def values(**more: Any) -> list[float]:
            return [
                float(functional.bca_contrastive_loss(view, view, **options, **more))
                for view in (balanced, collapsed)
            ]

        printed = values(positive_in_denominator=False)
        assert printed[0] == pytest.approx(printed[1], rel=1e-6)
        assert printed[0] == pytest.approx(-(n / k) / 0.5 + math.log(k - 1), rel=1e-6)
        kept = values(positive_in_denominator=True)
        assert kept[0] < kept[1] - 1


class TestMassAndEntropy:
    @pytest.mark.parametrize(("n", "k"), SIZES)
    def test_mass(self, n: int, k: int) -> None:
        assignments = random_assignments(n, k)
        value = functional.cluster_mass(assignments)
        assert value.shape == (k,)
        same(value, oracle.mass(rows(assignments)))
        same(value.sum(), float(n))

    def test_mass_gradcheck(self) -> None:
        assert gradcheck(functional.cluster_mass, (random_assignments(3, 4).requires_grad_(),))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize(("n", "k"), SIZES)
    def test_value_and_gradient(self, n: int, k: int, reduction: str) -> None:
        assignments = random_assignments(n, k).requires_grad_()
        value = functional.cluster_entropy_regularizer(assignments, reduction=reduction)
        assert value.shape == ()
        same(value, oracle.entropy_regularizer(rows(assignments), reduction=reduction))
        (actual,) = gradients(value, assignments)
        expected = oracle.finite_differences(
            lambda matrix: oracle.entropy_regularizer(matrix, reduction=reduction),
            rows(assignments),
        )
        same(actual, expected, 1e-7)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_gradcheck(self, reduction: str) -> None:
        def function(assignments: Tensor) -> Tensor:
            return functional.cluster_entropy_regularizer(assignments, reduction=reduction)

        assert gradcheck(function, (random_assignments(4, 3).requires_grad_(),))
        assert gradgradcheck(function, (random_assignments(4, 3).requires_grad_(),))

    @pytest.mark.parametrize("k", [2, 3, 8])
    def test_zero_when_balanced(self, k: int) -> None:
        same(functional.cluster_entropy_regularizer(oracle.uniform(5, k)), 0.0)
        same(functional.cluster_entropy_regularizer(oracle.one_hot(3 * k, k)), 0.0)

    @pytest.mark.parametrize(("n", "k"), SIZES)
    def test_log_k_when_collapsed(self, n: int, k: int) -> None:
        assignments = oracle.collapsed(n, k)
        same(functional.cluster_entropy_regularizer(assignments), math.log(k))
        total = functional.cluster_entropy_regularizer(assignments, reduction="sum")
        same(total, n * math.log(k))

    def test_half_of_the_clusters_in_use_is_log_two(self) -> None:
        same(functional.cluster_entropy_regularizer(oracle.one_hot(4, 8)), math.log(2))

    @pytest.mark.parametrize("n", [1, 2, 7])
    def test_sum_is_n_times_mean(self, n: int) -> None:
        assignments = random_assignments(n, 5)
        mean = functional.cluster_entropy_regularizer(assignments)
        total = functional.cluster_entropy_regularizer(assignments, reduction="sum")
        same(total, n * mean.item())

    def test_minimising_it_spreads_the_mass(self) -> None:
        logits = random_embeddings(6, 4).requires_grad_()
        before = functional.cluster_entropy_regularizer(logits.softmax(1))
        (gradient,) = gradients(before, logits)
        after = functional.cluster_entropy_regularizer((logits - 0.1 * gradient).softmax(1))
        assert 0 < after.item() < before.item()

    @given(n=st.integers(1, 12), k=st.integers(2, 9), seed=st.integers(0, 10_000))
    def test_bounds_and_permutations(self, n: int, k: int, seed: int) -> None:
        assignments = random_assignments(n, k, seed)
        value = functional.cluster_entropy_regularizer(assignments).item()
        assert -1e-12 <= value <= math.log(k) + 1e-12
        shuffled = assignments[shuffle(n, seed)][:, shuffle(k, seed + 1)]
        same(functional.cluster_entropy_regularizer(shuffled), value)

    @given(n=st.integers(1, 40), k=st.integers(2, 9), seed=st.integers(0, 10_000))
    def test_monotone_towards_uniform(self, n: int, k: int, seed: int) -> None:
        assignments = random_assignments(n, k, seed)
        mixed = 0.5 * assignments + 0.5 * oracle.uniform(n, k)
        less = functional.cluster_entropy_regularizer(mixed).item()
        assert less <= functional.cluster_entropy_regularizer(assignments).item() + 1e-12


class TestObjective:
    @pytest.mark.parametrize("options", OBJECTIVE_OPTIONS, ids=label)
    @pytest.mark.parametrize("n", [1, 2, 7])
    def test_value(self, n: int, options: dict[str, Any]) -> None:
        inputs = objective_inputs(n)
        options = {**options, "cluster_weight": 0.7, "entropy_weight": 0.3, "temperature": 0.2}
        actual = functional.c2bin_loss(*inputs, **options)
        expected = objective_oracle(inputs, **options)
        for got, wanted in zip(actual, expected, strict=True):
            assert got.shape == ()
            same(got, wanted, 1e-11)

    @pytest.mark.parametrize("options", OBJECTIVE_OPTIONS, ids=label)
    def test_gradient(self, options: dict[str, Any]) -> None:
        predictions, targets, assignments = objective_inputs(3, 2, (2, 3))
        loss = functional.c2bin_loss(predictions, targets, assignments, **options).loss
        tensors = [*predictions, *assignments[0], *assignments[1]]
        actual = torch.autograd.grad(loss, tensors, allow_unused=True)
        matrices = [rows(tensor) for tensor in tensors]
        fixed = [rows(target) for target in targets]

        def function(position: int, matrix: oracle.Matrix) -> float:
            m = [*matrices[:position], matrix, *matrices[position + 1 :]]
            return oracle.total(m[:2], fixed, (m[2:4], m[4:6]), **options)[0]

        for position, got in enumerate(actual):
            expected = oracle.finite_differences(
                lambda matrix, position=position: function(position, matrix),
                rows(tensors[position]),
            )
            same(torch.zeros_like(tensors[position]) if got is None else got, expected, 1e-7)

    @pytest.mark.parametrize("options", OBJECTIVE_OPTIONS[::5], ids=label)
    def test_gradcheck(self, options: dict[str, Any]) -> None:
        predictions, targets, assignments = objective_inputs(3, 2, (2, 3))

        def function(*leaves: Tensor) -> Tensor:
            heads = (leaves[2:4], leaves[4:6])
            return functional.c2bin_loss(leaves[:2], targets, heads, **options).loss

        leaves = (*predictions, *assignments[0], *assignments[1])
        assert gradcheck(function, leaves)
        assert gradgradcheck(function, leaves)

    def test_every_part_has_its_own_gradient(self) -> None:
        predictions, targets, assignments = objective_inputs()
        output = functional.c2bin_loss(predictions, targets, assignments)
        leaves = [*predictions, *assignments[0], *assignments[1]]

        def of(value: Tensor) -> list[Tensor]:
            found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            return [
                torch.zeros_like(leaf) if gradient is None else gradient
                for leaf, gradient in zip(leaves, found, strict=True)
            ]

        whole = of(output.loss)
        parts = [of(output.alignment), of(output.contrast), of(output.entropy)]
        for position, gradient in enumerate(whole):
            a, c, e = (part[position] for part in parts)
            same(gradient, a + 2.0 * (c + 1.0 * e))
        assert all(bool((g == 0).all()) for g in parts[0][2:])
        assert all(bool((g == 0).all()) for part in parts[1:] for g in part[:2])

    def test_defaults(self) -> None:
        inputs = objective_inputs()
        for got, wanted in zip(
            functional.c2bin_loss(*inputs), objective_oracle(inputs), strict=True
        ):
            same(got, wanted)

    def test_output_is_a_named_tuple(self) -> None:
        output = functional.c2bin_loss(*objective_inputs())
        assert output._fields == ("loss", "alignment", "contrast", "entropy")
        assert output.loss is output[0]

    def test_loss_combines_the_parts(self) -> None:
        output = functional.c2bin_loss(*objective_inputs(), cluster_weight=0.4, entropy_weight=0.1)
        same(output.loss, output.alignment + 0.4 * (output.contrast + 0.1 * output.entropy))

    def test_zero_weights_leave_the_alignment(self) -> None:
        output = functional.c2bin_loss(*objective_inputs(), cluster_weight=0.0)
        same(output.loss, output.alignment.item())

    def test_predictions_meet_the_targets_of_the_other_view(self) -> None:
        p0, p1, z0, z1 = (random_embeddings(4, 3, seed) for seed in range(4))
        _, _, heads = objective_inputs()
        output = functional.c2bin_loss((p0, p1), (z0, z1), heads)
        crossed = functional.bootstrap_alignment_loss(p0, z1) + functional.bootstrap_alignment_loss(
            p1, z0
        )
        same(output.alignment, crossed / 2)
        one = functional.c2bin_loss((p0, p1), (z0, z1), heads, symmetric_alignment=False)
        same(one.alignment, functional.bootstrap_alignment_loss(p0, z1))

    def test_no_gradient_to_the_targets(self) -> None:
        predictions, targets, assignments = objective_inputs()
        targets = tuple(target.requires_grad_() for target in targets)
        functional.c2bin_loss(predictions, targets, assignments).loss.backward()
        assert [target.grad for target in targets] == [None, None]

    def test_view_swap(self) -> None:
        inputs = objective_inputs()
        swapped = tuple(pair[::-1] for pair in inputs)
        for a, b in zip(
            functional.c2bin_loss(*inputs), functional.c2bin_loss(*swapped), strict=True
        ):
            same(a, b.item())

    def test_heads_add_up_and_their_order_does_not_matter(self) -> None:
        predictions, targets, assignments = objective_inputs()
        whole = functional.c2bin_loss(predictions, targets, assignments)
        reverse = functional.c2bin_loss(predictions, targets, [view[::-1] for view in assignments])
        single = [
            functional.c2bin_loss(predictions, targets, ([first], [second]))
            for first, second in zip(*assignments, strict=True)
        ]
        for name in ("contrast", "entropy"):
            same(getattr(whole, name), sum(getattr(one, name).item() for one in single))
            same(getattr(whole, name), getattr(reverse, name).item())

    def test_instance_permutation(self) -> None:
        predictions, targets, assignments = objective_inputs(7)
        order = shuffle(7, 0)
        permuted = functional.c2bin_loss(
            [p[order] for p in predictions],
            [z[order] for z in targets],
            [[head[order] for head in view] for view in assignments],
        )
        for a, b in zip(
            permuted, functional.c2bin_loss(predictions, targets, assignments), strict=True
        ):
            same(a, b.item())

    def test_widths_of_embeddings_and_heads_are_unrelated(self) -> None:
        inputs = objective_inputs(2, 1, (9,))
        same(functional.c2bin_loss(*inputs).loss, objective_oracle(inputs)[0])


# Wrong input -------------------------------------------------------------------------------

POSITIVE = ("positive", "> 0", "greater than 0")
NON_NEGATIVE = ("non-negative", ">= 0", "at least 0", "not negative", "nonnegative")
FLOATING = ("floating", "float")
TWO_CLUSTERS = ("at least 2", "K >= 2", ">= 2", "at least two", "two clusters")
ONE_ROW = ("at least 1", "n >= 1", ">= 1", "at least one", "one instance", "one row")
TWO_D = ("2-D", "(n, K)", "(n, d)", "two-dimensional", "2 dimensions")


PAIRED = {
    "contrast": (functional.bca_contrastive_loss, "assignments0", "assignments1"),
    "alignment": (functional.bootstrap_alignment_loss, "prediction", "target"),
}
SINGLE = {
    "mass": (functional.cluster_mass, "assignments"),
    "entropy": (functional.cluster_entropy_regularizer, "assignments"),
}


def follower_heads(seed: int = 30) -> tuple[Any, ...]:
    return tuple(
        tuple(random_assignments(4, k, seed + 7 * view + k).requires_grad_() for k in HEADS)
        for view in range(2)
    )


class TestAgainstTheFollower:
    @pytest.mark.parametrize("options", [{}, *OBJECTIVE_OPTIONS[::3]], ids=label)
    def test_is_the_mean_of_two_contrasts(self, options: dict[str, Any]) -> None:
        """Runner's view 0 with follower's view 1, and 1 with 0, by the oracle's loops."""
        predictions, targets, assignments = objective_inputs()
        fixed = follower_heads()
        found = functional.c2bin_loss(
            predictions, targets, assignments, target_assignments=fixed, **options
        )
        ways = [
            objective_oracle((predictions, targets, pair), **options)
            for pair in ((assignments[0], fixed[1]), (assignments[1], fixed[0]))
        ]
        for value, first, second in zip(found, *ways, strict=True):
            same(value, (first + second) / 2)

    def test_the_follower_gets_no_gradient(self) -> None:
        predictions, targets, assignments = objective_inputs()
        fixed = follower_heads()
        functional.c2bin_loss(
            predictions, targets, assignments, target_assignments=fixed
        ).loss.backward()
        assert all(head.grad is None for view in fixed for head in view)
        assert all(head.grad.abs().sum() > 0 for view in assignments for head in view)

    def test_gradient(self) -> None:
        predictions, targets, assignments = objective_inputs()
        fixed = follower_heads()
        inputs = [head for view in assignments for head in view]
        heads = len(HEADS)

        def loss(*flat: Tensor) -> Tensor:
            views = flat[:heads], flat[heads:]
            return functional.c2bin_loss(predictions, targets, views, target_assignments=fixed).loss

        assert gradcheck(loss, inputs)

    def test_micro_batches_add_up(self) -> None:
        predictions, targets, assignments = objective_inputs()
        fixed = follower_heads()
        everything = predictions, targets, assignments, fixed

        def part(rows: slice) -> tuple[Any, ...]:
            return tuple(
                tuple(x[rows] if isinstance(x, Tensor) else [h[rows] for h in x] for x in pair)
                for pair in everything
            )

        criterion = C2BINLoss(temperature=0.3)
        parts = [part(slice(0, 1)), part(slice(1, 4))]
        total = sum(criterion.statistics(*p[:3], target_assignments=p[3]) for p in parts)
        whole = criterion(*everything[:3], target_assignments=fixed).loss
        inputs = [head for view in assignments for head in view]
        grads = gradients(whole, *inputs)
        losses = [criterion(*p[:3], statistics=total, target_assignments=p[3]).loss for p in parts]
        for loss in losses:
            same(loss, whole)
        for found, wanted in zip(gradients(sum(losses), *inputs), grads, strict=True):
            same(found, wanted)

    def test_errors(self, complains: Any) -> None:
        inputs, fixed = objective_inputs(), follower_heads()
        with complains(TypeError, "target_assignments[0]: expected a sequence", "Tensor"):
            functional.c2bin_loss(*inputs, target_assignments=(fixed[0][0], fixed[1]))
        with complains(
            ValueError, "target_assignments: expected heads of [2, 5, 3] clusters", "[2, 5]"
        ):
            functional.c2bin_loss(*inputs, target_assignments=tuple(view[:2] for view in fixed))
        short = tuple([head[:3] for head in view] for view in fixed)
        with complains(ValueError, "target_assignments[0][0]: expected n = 4 rows", "(3, 2)"):
            functional.c2bin_loss(*inputs, target_assignments=short)
        smoothed = C2BINLoss(running_decay=0.5, num_clusters=HEADS)
        with complains(ValueError, "target_assignments: expected None together with running"):
            smoothed(*inputs, target_assignments=fixed)


@pytest.mark.parametrize("which", PAIRED)
class TestPairedErrors:
    @pytest.mark.parametrize("shape", [(4,), (4, 3, 2), ()])
    @pytest.mark.parametrize("side", [0, 1])
    def test_rank(self, which: str, shape: tuple[int, ...], side: int, complains: Any) -> None:
        function, *names = PAIRED[which]
        inputs = [torch.rand(4, 3), torch.rand(4, 3)]
        inputs[side] = torch.rand(shape)
        received = ", ".join(map(str, shape))
        with complains(ValueError, names[side], received, TWO_D):
            function(*inputs)

    @pytest.mark.parametrize("shape", [(4, 5), (6, 3)])
    def test_sizes(self, which: str, shape: tuple[int, int], complains: Any) -> None:
        function, *names = PAIRED[which]
        with complains(ValueError, *names, "4, 3", f"{shape[0]}, {shape[1]}"):
            function(torch.rand(4, 3), torch.rand(shape))

    def test_devices(self, which: str, complains: Any) -> None:
        function, *names = PAIRED[which]
        with complains(ValueError, *names, "cpu", "meta"):
            function(torch.rand(4, 3), torch.rand(4, 3, device="meta"))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    @pytest.mark.parametrize("side", [0, 1])
    def test_dtype(self, which: str, dtype: torch.dtype, side: int, complains: Any) -> None:
        function, *names = PAIRED[which]
        inputs = [torch.rand(4, 3), torch.rand(4, 3)]
        inputs[side] = torch.ones(4, 3, dtype=dtype)
        with complains(TypeError, names[side], str(dtype), FLOATING):
            function(*inputs)

    def test_no_instances(self, which: str, complains: Any) -> None:
        function, *names = PAIRED[which]
        with complains(ValueError, names[0], "0, 3", ONE_ROW):
            function(torch.rand(0, 3), torch.rand(0, 3))

    @pytest.mark.parametrize("wrong", [[[0.5, 0.5]], None, 1.0])
    @pytest.mark.parametrize("side", [0, 1])
    def test_not_a_tensor(self, which: str, wrong: Any, side: int, complains: Any) -> None:
        function, *names = PAIRED[which]
        inputs: list[Any] = [torch.rand(1, 2), torch.rand(1, 2)]
        inputs[side] = wrong
        with complains(TypeError, names[side], type(wrong).__name__, ("tensor", "Tensor")):
            function(*inputs)


@pytest.mark.parametrize("which", SINGLE)
class TestSingleErrors:
    @pytest.mark.parametrize("shape", [(4,), (4, 3, 2), ()])
    def test_rank(self, which: str, shape: tuple[int, ...], complains: Any) -> None:
        function, name = SINGLE[which]
        with complains(ValueError, name, ", ".join(map(str, shape)), TWO_D):
            function(torch.rand(shape))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex128])
    def test_dtype(self, which: str, dtype: torch.dtype, complains: Any) -> None:
        function, name = SINGLE[which]
        with complains(TypeError, name, str(dtype), FLOATING):
            function(torch.ones(4, 3, dtype=dtype))

    def test_no_instances(self, which: str, complains: Any) -> None:
        function, name = SINGLE[which]
        with complains(ValueError, name, "0, 3", ONE_ROW):
            function(torch.rand(0, 3))

    def test_not_a_tensor(self, which: str, complains: Any) -> None:
        function, name = SINGLE[which]
        with complains(TypeError, name, "list", ("tensor", "Tensor")):
            function([[0.5, 0.5]])

    @pytest.mark.parametrize("k", [0, 1])
    def test_too_few_clusters(self, which: str, k: int, complains: Any) -> None:
        function, name = SINGLE[which]
        with complains(ValueError, name, f"4, {k}", TWO_CLUSTERS):
            function(torch.rand(4, k))


class TestOptionErrors:
    @pytest.mark.parametrize("k", [0, 1])
    def test_contrast_of_too_few_clusters(self, k: int, complains: Any) -> None:
        with complains(ValueError, "assignments0", f"4, {k}", TWO_CLUSTERS):
            functional.bca_contrastive_loss(torch.rand(4, k), torch.rand(4, k))

    @pytest.mark.parametrize("wrong", [0, 0.0, -1.5, math.nan, math.inf, -math.inf])
    def test_temperature_value(self, wrong: float, complains: Any) -> None:
        first, second = views(4, 3)
        with complains(ValueError, "temperature", str(wrong), POSITIVE):
            functional.bca_contrastive_loss(first, second, temperature=wrong)
        with complains(ValueError, "temperature", str(wrong), POSITIVE):
            functional.c2bin_loss(*objective_inputs(), temperature=wrong)

    @pytest.mark.parametrize("wrong", ["0.5", None, True, [0.5]])
    def test_temperature_type(self, wrong: Any, complains: Any) -> None:
        first, second = views(4, 3)
        with complains(TypeError, "temperature", type(wrong).__name__, ("number", "float")):
            functional.bca_contrastive_loss(first, second, temperature=wrong)

    @pytest.mark.parametrize("wrong", ["euclidean", "Cosine", ""])
    def test_similarity(self, wrong: str, complains: Any) -> None:
        first, second = views(4, 3)
        with complains(ValueError, "similarity", repr(wrong), "cosine", "dot"):
            functional.bca_contrastive_loss(first, second, similarity=wrong)
        with complains(ValueError, "similarity", repr(wrong), "cosine", "dot"):
            functional.c2bin_loss(*objective_inputs(), similarity=wrong)

    @pytest.mark.parametrize("wrong", ["none", "SUM", ""])
    def test_reduction(self, wrong: str, complains: Any) -> None:
        with complains(ValueError, "reduction", repr(wrong), "mean", "sum"):
            functional.cluster_entropy_regularizer(random_assignments(4, 3), reduction=wrong)
        with complains(ValueError, "reduction", repr(wrong), "mean", "sum"):
            functional.c2bin_loss(*objective_inputs(), reduction=wrong)

    @pytest.mark.parametrize("name", ["cluster_weight", "entropy_weight"])
    @pytest.mark.parametrize("wrong", [-1, -1e-9, math.nan, math.inf])
    def test_weights(self, name: str, wrong: float, complains: Any) -> None:
        with complains(ValueError, name, str(wrong), NON_NEGATIVE):
            functional.c2bin_loss(*objective_inputs(), **{name: wrong})

    @pytest.mark.parametrize("name", ["cluster_weight", "entropy_weight"])
    @pytest.mark.parametrize("wrong", ["1", None, True])
    def test_weight_types(self, name: str, wrong: Any, complains: Any) -> None:
        with complains(TypeError, name, type(wrong).__name__, ("number", "float")):
            functional.c2bin_loss(*objective_inputs(), **{name: wrong})

    @pytest.mark.parametrize("wrong", [(3, 1), (0,), (-2, 4)])
    def test_num_clusters_value(self, wrong: tuple[int, ...], complains: Any) -> None:
        with complains(
            ValueError, "num_clusters", (f"got {min(wrong)}", f"got {wrong}"), TWO_CLUSTERS
        ):
            functional.cluster_assignments(torch.rand(4, 5), wrong)

    def test_num_clusters_empty(self, complains: Any) -> None:
        with complains(ValueError, "num_clusters", ("at least", "empty")):
            functional.cluster_assignments(torch.rand(4, 5), ())

    @pytest.mark.parametrize("wrong", [5, (2.0, 3.0), ("2", "3"), None, (True, 4), "23"])
    def test_num_clusters_type(self, wrong: Any, complains: Any) -> None:
        with complains(TypeError, "num_clusters", ("int", "integer")):
            functional.cluster_assignments(torch.rand(4, 5), wrong)

    def test_num_clusters_must_add_up(self, complains: Any) -> None:
        with complains(ValueError, "logits", "4, 6", "5"):
            functional.cluster_assignments(torch.rand(4, 6), (2, 3))

    def test_logits(self, complains: Any) -> None:
        with complains(ValueError, "logits", "(5,)"):
            functional.cluster_assignments(torch.rand(5), (2, 3))
        with complains(TypeError, "logits", "torch.int64", FLOATING):
            functional.cluster_assignments(torch.ones(4, 5, dtype=torch.long), (2, 3))
        with complains(TypeError, "logits", "list", ("tensor", "Tensor")):
            functional.cluster_assignments([[1.0] * 5], (2, 3))


class TestObjectiveErrors:
    @pytest.mark.parametrize("position", [0, 1, 2])
    @pytest.mark.parametrize("length", [0, 1, 3])
    def test_not_a_pair(self, position: int, length: int, complains: Any) -> None:
        inputs = list(objective_inputs())
        inputs[position] = (inputs[position] * 2)[:length]
        name = ("predictions", "targets", "assignments")[position]
        with complains(ValueError, name, str(length), ("pair", "two", "2")):
            functional.c2bin_loss(*inputs)

    @pytest.mark.parametrize("position", [0, 1, 2])
    @pytest.mark.parametrize("wrong", [None, 3, torch.rand(4, 3), torch.rand(2, 4, 3)])
    def test_not_a_sequence(self, position: int, wrong: Any, complains: Any) -> None:
        inputs = list(objective_inputs())
        inputs[position] = wrong
        name = ("predictions", "targets", "assignments")[position]
        with complains(TypeError, name, type(wrong).__name__, ("pair", "two", "tuple")):
            functional.c2bin_loss(*inputs)

    @pytest.mark.parametrize("position", [0, 1])
    def test_element_is_not_a_tensor(self, position: int, complains: Any) -> None:
        inputs = list(objective_inputs())
        inputs[position] = (inputs[position][0], [[1.0, 2.0, 3.0]] * 4)
        with complains(
            TypeError, ("predictions", "targets")[position], "list", ("tensor", "Tensor")
        ):
            functional.c2bin_loss(*inputs)

    def test_head_is_not_a_tensor(self, complains: Any) -> None:
        predictions, targets, (first, second) = objective_inputs()
        with complains(TypeError, "assignments", "str", ("tensor", "Tensor")):
            functional.c2bin_loss(predictions, targets, (first, (*second[:-1], "head")))

    def test_different_number_of_heads(self, complains: Any) -> None:
        predictions, targets, (first, second) = objective_inputs()
        with complains(ValueError, "assignments", "3", "2"):
            functional.c2bin_loss(predictions, targets, (first, second[:-1]))

    def test_no_heads(self, complains: Any) -> None:
        predictions, targets, _ = objective_inputs()
        with complains(ValueError, "assignments", ("at least", "empty", "no head", "one")):
            functional.c2bin_loss(predictions, targets, ((), ()))

    def test_different_clusters_in_one_head(self, complains: Any) -> None:
        predictions, targets, (first, second) = objective_inputs()
        with complains(ValueError, "assignments", "4, 2", "4, 3"):
            functional.c2bin_loss(predictions, targets, (first, second[::-1]))

    def test_different_instances_in_one_head(self, complains: Any) -> None:
        predictions, targets, (first, second) = objective_inputs()
        shorter = (*second[:-1], second[-1][:3])
        with complains(ValueError, "assignments[1][2]", "3, 3", "4"):
            functional.c2bin_loss(predictions, targets, (first, shorter))

    def test_different_instances_between_heads(self, complains: Any) -> None:
        predictions, targets, views_ = objective_inputs()
        uneven = tuple((*view[:-1], view[-1][:3]) for view in views_)
        with complains(ValueError, "assignments", "3", "4"):
            functional.c2bin_loss(predictions, targets, uneven)

    def test_different_instances_than_the_predictions(self, complains: Any) -> None:
        predictions, targets, _ = objective_inputs(4)
        _, _, assignments = objective_inputs(6)
        with complains(ValueError, "assignments", "predictions", "6", "4"):
            functional.c2bin_loss(predictions, targets, assignments)

    def test_different_widths_of_prediction_and_target(self, complains: Any) -> None:
        predictions, _, assignments = objective_inputs(4, 3)
        _, targets, _ = objective_inputs(4, 5)
        with complains(ValueError, "predictions", "targets", "4, 3", "4, 5"):
            functional.c2bin_loss(predictions, targets, assignments)

    def test_devices(self, complains: Any) -> None:
        predictions, targets, assignments = objective_inputs()
        elsewhere = tuple(target.to("meta") for target in targets)
        with complains(ValueError, "targets", "cpu", "meta"):
            functional.c2bin_loss(predictions, elsewhere, assignments)
        elsewhere = tuple(tuple(head.to("meta") for head in view) for view in assignments)
        with complains(ValueError, "assignments", "cpu", "meta"):
            functional.c2bin_loss(predictions, targets, elsewhere)

    @pytest.mark.parametrize("position", [0, 1])
    def test_dtype(self, position: int, complains: Any) -> None:
        inputs = list(objective_inputs())
        inputs[position] = tuple(view.detach().long() for view in inputs[position])
        name = ("predictions", "targets")[position]
        with complains(TypeError, name, "torch.int64", FLOATING):
            functional.c2bin_loss(*inputs)

    def test_too_few_clusters(self, complains: Any) -> None:
        predictions, targets, _ = objective_inputs()
        ones = torch.ones(4, 1, dtype=torch.float64)
        with complains(ValueError, "assignments", "4, 1", TWO_CLUSTERS):
            functional.c2bin_loss(predictions, targets, ((ones,), (ones,)))

    def test_no_instances(self, complains: Any) -> None:
        with complains(ValueError, ("predictions", "targets", "assignments"), "0", ONE_ROW):
            functional.c2bin_loss(*objective_inputs(0))


def spoil(assignments: Tensor, how: str) -> Tensor:
    spoiled = assignments.detach().clone()
    if how == "negative":
        spoiled[1, 0], spoiled[1, 1] = -0.25, spoiled[1, :2].sum() + 0.25
    elif how == "row sum":
        spoiled[1] *= 1.25
    else:
        spoiled[1, 0] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[how]
    return spoiled


SPOILED = ["nan", "inf", "-inf", "row sum", "negative"]


class TestValidation:
    @pytest.mark.parametrize("how", SPOILED)
    def test_entropy(self, how: str, complains: Any) -> None:
        wrong = spoil(random_assignments(4, 3), how)
        with complains(ValueError, "assignments"):
            functional.cluster_entropy_regularizer(wrong, validate_args=True)

    @pytest.mark.parametrize("how", SPOILED)
    @pytest.mark.parametrize("side", [0, 1])
    def test_contrast(self, how: str, side: int, complains: Any) -> None:
        inputs = list(views(4, 3))
        inputs[side] = spoil(inputs[side], how)
        with complains(ValueError, f"assignments{side}"):
            functional.bca_contrastive_loss(*inputs, validate_args=True)

    @pytest.mark.parametrize("how", SPOILED)
    @pytest.mark.parametrize("view", [0, 1])
    @pytest.mark.parametrize("head", [0, 2])
    def test_objective(self, how: str, view: int, head: int, complains: Any) -> None:
        predictions, targets, assignments = objective_inputs()
        heads = [list(heads) for heads in assignments]
        heads[view][head] = spoil(heads[view][head], how)
        with complains(ValueError, "assignments"):
            functional.c2bin_loss(predictions, targets, heads, validate_args=True)

    @pytest.mark.parametrize("position", [0, 1])
    @pytest.mark.parametrize("wrong", [math.nan, math.inf])
    def test_embeddings(self, position: int, wrong: float, complains: Any) -> None:
        inputs = list(objective_inputs())
        spoiled = inputs[position][1].detach().clone()
        spoiled[0, 0] = wrong
        inputs[position] = (inputs[position][0], spoiled)
        name = ("predictions", "targets")[position]
        with complains(ValueError, name, "finite"):
            functional.c2bin_loss(*inputs, validate_args=True)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("k", [2, 128])
    def test_rounded_rows_are_accepted(self, dtype: torch.dtype, k: int) -> None:
        first, second = (random_assignments(8, k, seed, dtype) for seed in (0, 1))
        checked = functional.bca_contrastive_loss(first, second, validate_args=True)
        assert torch.equal(checked, functional.bca_contrastive_loss(first, second))
        functional.cluster_entropy_regularizer(first, validate_args=True)

    @pytest.mark.parametrize("extreme", [oracle.one_hot, oracle.uniform, oracle.collapsed])
    def test_extremes_are_accepted(self, extreme: Any) -> None:
        view = extreme(6, 4)
        functional.bca_contrastive_loss(view, view, validate_args=True)
        functional.cluster_entropy_regularizer(view, validate_args=True)

    def test_embeddings_of_the_alignment(self, complains: Any) -> None:
        good, bad = random_embeddings(4, 3), torch.full((4, 3), math.nan)
        for side, name in enumerate(("prediction", "target")):
            inputs = [good.float(), good.float()]
            inputs[side] = bad
            functional.bootstrap_alignment_loss(*inputs)
            with complains(ValueError, name, "finite"):
                functional.bootstrap_alignment_loss(*inputs, validate_args=True)

    @pytest.mark.filterwarnings("always")
    def test_checking_leaves_that_need_a_gradient_is_silent(
        self, recwarn: pytest.WarningsRecorder
    ) -> None:
        first, second = views(4, 3)
        functional.bca_contrastive_loss(first, second, validate_args=True)
        functional.cluster_entropy_regularizer(first, validate_args=True)
        functional.c2bin_loss(*objective_inputs(), validate_args=True)
        assert [str(warning.message) for warning in recwarn] == []

    def test_valid_objective_is_accepted(self) -> None:
        inputs = objective_inputs()
        checked = functional.c2bin_loss(*inputs, validate_args=True)
        assert torch.equal(checked.loss, functional.c2bin_loss(*inputs).loss)

    @pytest.mark.parametrize("how", SPOILED)
    def test_nothing_is_checked_by_default(self, how: str) -> None:
        first, second = views(4, 3)
        functional.bca_contrastive_loss(spoil(first, how), second)
        functional.cluster_entropy_regularizer(spoil(first, how))
        predictions, targets, _ = objective_inputs()
        functional.c2bin_loss(predictions, targets, ((spoil(first, how),), (second,)))

    def test_rows_that_do_not_sum_to_one_are_normalised_by_their_total(self) -> None:
        assignments = 3 * random_assignments(4, 3)
        same(
            functional.cluster_entropy_regularizer(assignments, reduction="sum"),
            oracle.entropy_regularizer(rows(assignments), reduction="sum"),
        )
