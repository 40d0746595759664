"""The functions: closed forms, invariances, and the oracle on numbers for a pencil."""

from __future__ import annotations

import itertools
import math
from typing import Any

import oracle
import pytest
import torch
from cases import (
    CASES,
    CONTRASTS,
    close,
    collapsed,
    dead_cluster,
    one_hot,
    random_assignments,
    random_embeddings,
    uniform,
)
from helpers import shuffle
from hypothesis import given
from hypothesis import strategies as st
from oracle import rows
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from c2bin_ext.functional import (
    bca_contrastive_loss,
    bootstrap_alignment_loss,
    c2bin_loss,
    cluster_assignments,
    cluster_entropy_regularizer,
    cluster_mass,
    multi_scale_cluster_loss,
)

SIZES = list(itertools.product([1, 2, 7], [2, 3, 8]))
sizes = pytest.mark.parametrize(("n", "k"), SIZES)
similarities = pytest.mark.parametrize("similarity", ["cosine", "dot"])
contrasts = pytest.mark.parametrize("options", CONTRASTS.values(), ids=CONTRASTS)


def views(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    first, second = random_assignments(n, k, seed), random_assignments(n, k, seed + 1000)
    return first.requires_grad_(), second.requires_grad_()


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf)[0]


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

    def test_follower_gives_contrast_and_no_entropy(self) -> None:
        even, one = [[0.5, 0.5]], [[0.0, 1.0]]
        loss, contrast, entropy = oracle.multi_scale(
            ([even], [even]), ([one], [even]), temperature=0.5, similarity="dot"
        )
        # View 0 meets the follower's view 1 (all scores 1/2: log 2), view 1 meets its view 0.
        mixed = 0.5 * (oracle.contrast(even, one, similarity="dot") + math.log(2))
        assert contrast == pytest.approx(mixed)
        assert mixed != pytest.approx(math.log(2))
        assert entropy == pytest.approx(0.0)
        assert loss == pytest.approx(contrast)

    def test_head(self) -> None:
        layer = {"weight": [[1.0]], "bias": None, "scale": [2.0], "shift": [0.5], "eps": 0.0}
        layer |= {"training": True, "mean": [0.0], "variance": [1.0]}
        head = {"weight": [[1.0], [0.0]], "bias": [0.0, 1.0], "clusters": (2,), "normalize": False}
        # 1 and 3 have mean 2 and variance 1: -1 and 1, then -1.5 and 2.5, of which 0 and 2.5 stay.
        found = oracle.scores([[1.0], [3.0]], head | {"hidden": layer})
        assert found == [[[0.0, 1.0], [2.5, 1.0]]]
        found = oracle.scores([[3.0]], head | {"hidden": layer | {"training": False}})
        assert found == [[[6.5, 1.0]]]
        head |= {"weight": [[1.0, 0.0], [0.0, 1.0]], "normalize": True, "hidden": None}
        (found,) = oracle.scores([[3.0, 4.0]], head)
        assert found[0] == pytest.approx([0.6 * 2**0.5, 0.8 * 2**0.5 + 1])

    def test_finite_differences(self) -> None:
        numbers = [[[1.0, 2.0]], ([3.0],)]
        found = oracle.finite_differences(lambda: numbers[0][0][1] ** 2 + numbers[1][0][0], numbers)
        assert found == pytest.approx([0.0, 4.0, 1.0])


class TestAlignment:
    @pytest.mark.parametrize(("factor", "expected"), [(2.0, 0.0), (-0.5, 2.0)])
    def test_parallel_and_opposite(self, factor: float, expected: float) -> None:
        target = random_embeddings(5, 3)
        close(bootstrap_alignment_loss(factor * target, target), expected)

    def test_orthogonal_is_one(self) -> None:
        prediction = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        close(bootstrap_alignment_loss(prediction, prediction.flip(1)), 1.0)

    def test_one_dimension(self) -> None:
        close(bootstrap_alignment_loss(*(random_embeddings(1, 1, s).abs() for s in (1, 2))), 0.0)

    def test_mean_over_instances_not_over_the_whole_matrix(self) -> None:
        prediction = torch.tensor([[100.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        target = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
        close(bootstrap_alignment_loss(prediction, target), 1.0)

    @pytest.mark.parametrize("which", ["prediction", "target"])
    def test_zero_vector_has_cosine_and_gradient_zero(self, which: str) -> None:
        inputs = {"prediction": random_embeddings(3, 4, 1), "target": random_embeddings(3, 4, 2)}
        inputs[which][1] = 0.0
        prediction = inputs["prediction"].requires_grad_()
        value = bootstrap_alignment_loss(prediction, inputs["target"])
        close(value.detach(), oracle.alignment(rows(prediction), rows(inputs["target"])))
        found = gradient(value, prediction)
        assert torch.all(found[1] == 0)
        assert torch.all(found[[0, 2]].abs().sum(dim=1) > 0)

    @given(exponent=st.floats(-20, 20), side=st.sampled_from(["prediction", "target", "both"]))
    def test_scale_invariance_in_float32(self, exponent: float, side: str) -> None:
        prediction, target = (random_embeddings(4, 3, s, torch.float32) for s in (1, 2))
        scale = 10.0**exponent
        scaled = bootstrap_alignment_loss(
            prediction * (scale if side != "target" else 1.0),
            target * (scale if side != "prediction" else 1.0),
        )
        close(scaled, bootstrap_alignment_loss(prediction, target), 1e-5)

    @pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
    def test_gradient_scales_inversely_in_float32(self, scale: float) -> None:
        prediction, target = (random_embeddings(4, 3, s, torch.float32) for s in (1, 2))
        scaled = (prediction * scale).requires_grad_()
        prediction.requires_grad_()
        expected = gradient(bootstrap_alignment_loss(prediction, target), prediction)
        found = gradient(bootstrap_alignment_loss(scaled, target), scaled)
        torch.testing.assert_close(found * scale, expected, rtol=1e-4, atol=1e-6)


class TestClusterAssignments:
    @pytest.mark.parametrize("n", [1, 2, 7])
    @pytest.mark.parametrize("num_clusters", [(2,), (2, 5, 3), [3, 3]])
    def test_value(self, n: int, num_clusters: tuple[int, ...]) -> None:
        logits = 3 * random_embeddings(n, sum(num_clusters))
        result = cluster_assignments(logits, num_clusters)
        assert isinstance(result, tuple)
        for head, part in zip(result, logits.split(list(num_clusters), dim=1), strict=True):
            close(head, torch.tensor(oracle.memberships(rows(part)), dtype=torch.float64))

    def test_gradcheck(self) -> None:
        logits = random_embeddings(3, 5).requires_grad_()
        assert gradcheck(lambda x: cluster_assignments(x, (2, 3)), (logits,))
        assert gradgradcheck(lambda x: cluster_assignments(x, (2, 3)), (logits,))


class TestContrast:
    @sizes
    @pytest.mark.parametrize("temperature", [0.5, 0.07])
    @contrasts
    def test_value(self, n: int, k: int, temperature: float, options: dict[str, Any]) -> None:
        options = {**options, "temperature": temperature}
        first, second = (view.detach() for view in views(n, k))
        expected = oracle.contrast(rows(first), rows(second), **options)
        close(bca_contrastive_loss(first, second, **options), expected, 1e-11)

    def test_non_contiguous_input_is_read_and_left_alone(self) -> None:
        first, second = (view.detach() for view in views(6, 4))
        copies = first.clone(), second.clone()
        strided = first.t().contiguous().t().requires_grad_()
        value = bca_contrastive_loss(strided, second.repeat(1, 2)[:, :4])
        close(value.detach(), oracle.contrast(rows(first), rows(second)))
        value.backward()
        assert torch.equal(strided.detach(), copies[0])
        assert torch.equal(second, copies[1])

    @pytest.mark.parametrize("k", [2, 3, 8])
    @pytest.mark.parametrize("per_cluster", [1, 3])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("t", [0.5, 0.1])
    def test_perfect_agreement(self, k: int, per_cluster: int, symmetric: bool, t: float) -> None:
        view = one_hot(per_cluster * k, k)
        for similarity, m in (("cosine", 1), ("dot", per_cluster)):
            options: dict[str, Any] = {
                "similarity": similarity,
                "temperature": t,
                "symmetric": symmetric,
            }
            kept = bca_contrastive_loss(view, view, **options)
            close(kept, math.log(math.exp(m / t) + k - 1) - m / t)
            left = bca_contrastive_loss(view, view, positive_in_denominator=False, **options)
            close(left, math.log(k - 1) - m / t)

    @similarities
    @sizes
    def test_uniform(self, n: int, k: int, similarity: str) -> None:
        view, options = uniform(n, k), {"similarity": similarity}
        close(bca_contrastive_loss(view, view, **options), math.log(k))
        left = bca_contrastive_loss(view, view, positive_in_denominator=False, **options)
        close(left, math.log(k - 1))

    @sizes
    def test_collapsed(self, n: int, k: int) -> None:
        view, t = collapsed(n, k), 0.5
        for similarity, m in (("cosine", 1), ("dot", n)):
            alive = math.log(math.exp(m / t) + k - 1) - m / t
            value = bca_contrastive_loss(view, view, similarity=similarity)
            close(value, (alive + (k - 1) * math.log(k)) / k)
        left = bca_contrastive_loss(view, view, positive_in_denominator=False)
        close(left, math.log(k - 1) - 1 / t / k)

    @pytest.mark.parametrize("positive", [True, False])
    def test_dead_column_has_cosine_and_gradient_zero(self, positive: bool) -> None:
        first, second = dead_cluster(5, 4).requires_grad_(), random_assignments(5, 4, 1)
        second.requires_grad_()
        options = {"positive_in_denominator": positive}
        value = bca_contrastive_loss(first, second, **options)
        numbers = [rows(first), rows(second)]

        def function() -> float:
            return oracle.contrast([[*row[:-1], 0.0] for row in numbers[0]], numbers[1], **options)

        close(value.detach(), function())
        on_first, on_second = torch.autograd.grad(value, (first, second))
        assert torch.all(on_first[:, -1] == 0)
        for found, matrix in ((on_first, numbers[0]), (on_second, numbers[1])):
            wanted = torch.tensor(oracle.finite_differences(function, matrix), dtype=torch.float64)
            close(found, wanted.reshape(found.shape), 1e-7)

    @given(
        n=st.integers(1, 12),
        k=st.integers(2, 9),
        seed=st.integers(0, 10_000),
        options=st.sampled_from(list(CONTRASTS.values())),
    )
    def test_permutations_and_swaps(
        self, n: int, k: int, seed: int, options: dict[str, Any]
    ) -> None:
        first, second = (view.detach() for view in views(n, k, seed))
        value = bca_contrastive_loss(first, second, **options)
        instances, clusters = shuffle(n, seed), shuffle(k, seed + 1)
        close(bca_contrastive_loss(first[instances], second[instances], **options), value, 1e-11)
        relabelled = bca_contrastive_loss(first[:, clusters], second[:, clusters], **options)
        close(relabelled, value, 1e-11)
        one_way = {**options, "symmetric": False}
        there, back = (
            bca_contrastive_loss(*pair, **one_way) for pair in ((first, second), (second, first))
        )
        close((there + back) / 2, bca_contrastive_loss(
            first, second, **{**options, "symmetric": True}), 1e-11)  # fmt: skip

    @similarities
    def test_one_direction_is_not_the_other(self, similarity: str) -> None:
        first, second = views(5, 4)
        options: dict[str, Any] = {"similarity": similarity, "symmetric": False}
        there = bca_contrastive_loss(first, second, **options)
        assert abs(there - bca_contrastive_loss(second, first, **options)) > 1e-4

    def test_relabelling_one_view_only_changes_the_loss(self) -> None:
        first, second = views(5, 4)
        value = bca_contrastive_loss(first, second)
        assert abs(value - bca_contrastive_loss(first, second.flip(1))) > 1e-4

    @pytest.mark.parametrize("positive", [True, False])
    def test_cosine_ignores_the_scale_of_a_column(self, positive: bool) -> None:
        first, second = views(5, 4)
        scales = torch.tensor([1e-6, 0.5, 3.0, 1e6], dtype=torch.float64)
        options = {"positive_in_denominator": positive}
        scaled = bca_contrastive_loss(first * scales, second * scales.flip(0), **options)
        close(scaled, bca_contrastive_loss(first, second, **options))

    def test_dot_does_not_ignore_the_scale(self) -> None:
        first, second = views(5, 4)
        plain = bca_contrastive_loss(first, second, similarity="dot")
        scaled = bca_contrastive_loss(2 * first, second, similarity="dot")
        assert abs(plain - scaled) > 1e-3

    def test_cosine_ignores_repetition_of_the_batch(self) -> None:
        first, second = views(5, 4)
        twice = bca_contrastive_loss(first.repeat(2, 1), second.repeat(2, 1))
        close(twice, bca_contrastive_loss(first, second))

    def test_as_printed_it_cannot_tell_balance_from_collapse(self) -> None:
        """Why the printed form needs its entropy term, and its positive."""
        n, k = 24, 6

        def values(**more: Any) -> list[float]:
            return [
                float(bca_contrastive_loss(v, v, similarity="dot", symmetric=False, **more))
                for v in (one_hot(n, k), collapsed(n, k))
            ]

        printed = values(positive_in_denominator=False)
        assert printed[0] == pytest.approx(printed[1], rel=1e-6)
        assert printed[0] == pytest.approx(-(n / k) / 0.5 + math.log(k - 1), rel=1e-6)
        kept = values(positive_in_denominator=True)
        assert kept[0] < kept[1] - 1


class TestMassAndEntropy:
    @sizes
    def test_mass(self, n: int, k: int) -> None:
        assignments = random_assignments(n, k)
        value = cluster_mass(assignments)
        close(value, torch.tensor(oracle.mass(rows(assignments)), dtype=torch.float64))
        close(value.sum(), float(n))

    def test_mass_gradcheck(self) -> None:
        assert gradcheck(cluster_mass, (random_assignments(3, 4).requires_grad_(),))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @sizes
    def test_value(self, n: int, k: int, reduction: str) -> None:
        assignments = random_assignments(n, k)
        expected = oracle.entropy_regularizer(rows(assignments), reduction=reduction)
        close(cluster_entropy_regularizer(assignments, reduction=reduction), expected)

    @pytest.mark.parametrize("k", [2, 3, 8])
    def test_zero_when_balanced(self, k: int) -> None:
        close(cluster_entropy_regularizer(uniform(5, k)), 0.0)
        close(cluster_entropy_regularizer(one_hot(3 * k, k)), 0.0)

    @sizes
    def test_log_k_when_collapsed(self, n: int, k: int) -> None:
        assignments = collapsed(n, k)
        close(cluster_entropy_regularizer(assignments), math.log(k))
        close(cluster_entropy_regularizer(assignments, reduction="sum"), n * math.log(k))

    def test_half_of_the_clusters_in_use_is_log_two(self) -> None:
        close(cluster_entropy_regularizer(one_hot(4, 8)), math.log(2))

    def test_rows_that_do_not_sum_to_one_are_normalised_by_their_total(self) -> None:
        assignments = 3 * random_assignments(4, 3)
        close(
            cluster_entropy_regularizer(assignments, reduction="sum"),
            oracle.entropy_regularizer(rows(assignments), reduction="sum"),
        )

    def test_minimising_it_spreads_the_mass(self) -> None:
        logits = random_embeddings(6, 4).requires_grad_()
        before = cluster_entropy_regularizer(logits.softmax(1))
        after = cluster_entropy_regularizer((logits - 0.1 * gradient(before, logits)).softmax(1))
        assert 0 < after < before

    @given(n=st.integers(1, 40), k=st.integers(2, 9), seed=st.integers(0, 10_000))
    def test_bounds_permutations_and_mixing(self, n: int, k: int, seed: int) -> None:
        assignments = random_assignments(n, k, seed)
        value = cluster_entropy_regularizer(assignments)
        assert 0 <= value <= math.log(k) + 1e-12
        close(cluster_entropy_regularizer(assignments[shuffle(n, seed)][:, shuffle(k, seed)]),
              value)  # fmt: skip
        mixed = 0.5 * assignments + 0.5 * uniform(n, k)
        assert cluster_entropy_regularizer(mixed) <= value + 1e-12


class TestObjective:
    def test_loss_combines_the_parts(self) -> None:
        inputs = CASES["objective"].arguments()
        output = c2bin_loss(*inputs, cluster_weight=0.4, entropy_weight=0.1)
        close(output.loss, output.alignment + 0.4 * (output.contrast + 0.1 * output.entropy))
        output = c2bin_loss(*inputs, cluster_weight=0)
        close(output.loss, output.alignment)

    def test_is_the_alignment_and_the_clusters(self) -> None:
        predictions, targets, assignments = CASES["objective"].arguments()
        whole = c2bin_loss(predictions, targets, assignments)
        clusters = multi_scale_cluster_loss(assignments)
        close(whole.contrast, clusters.contrast)
        close(whole.entropy, clusters.entropy)
        close(whole.loss, whole.alignment + 0.5 * clusters.loss)
        crossed = sum(
            bootstrap_alignment_loss(p, z) for p, z in zip(predictions, targets[::-1], strict=True)
        )
        close(whole.alignment, crossed / 2)
        one = c2bin_loss(predictions, targets, assignments, symmetric_alignment=False)
        close(one.alignment, bootstrap_alignment_loss(predictions[0], targets[1]))

    @pytest.mark.parametrize("name", ["objective", "objective and follower"])
    def test_view_swap(self, name: str) -> None:
        inputs = CASES[name].arguments()
        close(c2bin_loss(*inputs[:3], target_assignments=dict(enumerate(inputs)).get(3)),
              c2bin_loss(*(pair[::-1] for pair in inputs[:3]),
                         target_assignments=inputs[3][::-1] if len(inputs) > 3 else None),
              )  # fmt: skip

    @pytest.mark.parametrize("name", ["clusters", "clusters and follower"])
    def test_heads_add_up_and_their_order_does_not_matter(self, name: str) -> None:
        inputs = CASES[name].arguments()

        def of(heads: slice) -> Any:
            own, *fixed = [tuple(view[heads] for view in pair) for pair in inputs]
            return multi_scale_cluster_loss(own, target_assignments=fixed[0] if fixed else None)

        whole = of(slice(None))
        close(of(slice(None, None, -1)), whole)
        singles = [of(slice(i, i + 1)) for i in range(3)]
        for part, name in zip(zip(*singles, strict=True), whole._fields, strict=True):
            close(sum(part), getattr(whole, name))

    def test_follower_contrast_is_the_mean_of_two_and_entropy_the_runner_s(self) -> None:
        own, fixed = CASES["clusters and follower"].arguments()
        found = multi_scale_cluster_loss(own, target_assignments=fixed)
        ways = [multi_scale_cluster_loss(pair) for pair in ((own[0], fixed[1]), (own[1], fixed[0]))]
        close(found.contrast, (ways[0].contrast + ways[1].contrast) / 2)
        close(found.entropy, multi_scale_cluster_loss(own).entropy)
        assert abs(found.entropy - (ways[0].entropy + ways[1].entropy) / 2) > 1e-3

    def test_instance_permutation(self) -> None:
        predictions, targets, assignments = CASES["objective"].arguments(7)
        order = shuffle(7, 0)
        permuted = c2bin_loss(
            [p[order] for p in predictions],
            [z[order] for z in targets],
            [[head[order] for head in view] for view in assignments],
        )
        close(permuted, c2bin_loss(predictions, targets, assignments))

    def test_widths_of_embeddings_and_heads_are_unrelated(self) -> None:
        narrow = tuple(random_embeddings(2, 1, seed) for seed in range(2))
        heads = tuple((random_assignments(2, 9, seed),) for seed in range(2))
        expected = oracle.total(*([rows(x) for x in narrow],) * 2,
                                [[rows(h) for h in view] for view in heads])  # fmt: skip
        close(c2bin_loss(narrow, narrow, heads).loss, expected[0])
