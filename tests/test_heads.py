"""The multi-scale head: one linear map, split and normalised per scale."""

from __future__ import annotations

import inspect
from typing import Any

import oracle
import pytest
import torch
from oracle import random_embeddings, rows
from torch import Tensor, nn

from c2bin_ext import MultiScaleClusterHead, functional

SCALES = [(2,), (2, 5, 3), (4, 4)]


def head_of(num_clusters: Any, d: int = 6, **options: Any) -> MultiScaleClusterHead:
    torch.manual_seed(0)
    return MultiScaleClusterHead(d, num_clusters, **options)


def test_signature() -> None:
    parameters = inspect.signature(MultiScaleClusterHead).parameters
    assert [(p.name, p.default) for p in parameters.values()] == [
        ("in_features", inspect.Parameter.empty),
        ("num_clusters", (32, 64, 128)),
        ("bias", True),
        ("normalize", False),
    ]


def test_default_scales_are_those_of_the_paper() -> None:
    outputs = MultiScaleClusterHead(6)(torch.randn(3, 6))
    assert [tuple(output.shape) for output in outputs] == [(3, 32), (3, 64), (3, 128)]


@pytest.mark.parametrize("num_clusters", SCALES)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_map_then_a_softmax_per_scale(
    num_clusters: tuple[int, ...], n: int, bias: bool
) -> None:
    head = head_of(num_clusters, bias=bias).double()
    features = random_embeddings(n, 6)
    weight = rows(head.linear.weight)
    offset = head.linear.bias.tolist() if bias else [0.0] * len(weight)
    logits = [
        [oracle.dot(row, weight[j]) + offset[j] for j in range(len(weight))]
        for row in rows(features)
    ]
    outputs, scores = head(features), head.logits(features)
    assert isinstance(outputs, tuple)
    assert isinstance(scores, tuple)
    start = 0
    for output, score, k in zip(outputs, scores, num_clusters, strict=True):
        part = [row[start : start + k] for row in logits]
        torch.testing.assert_close(score, torch.tensor(part, dtype=torch.float64))
        torch.testing.assert_close(
            output, torch.tensor(oracle.memberships(part), dtype=torch.float64)
        )
        start += k


@pytest.mark.parametrize("num_clusters", SCALES)
def test_rows_sum_to_one(num_clusters: tuple[int, ...]) -> None:
    for output in head_of(num_clusters)(torch.randn(5, 6)):
        assert output.dtype is torch.float32
        assert (output >= 0).all()
        torch.testing.assert_close(output.sum(dim=1), torch.ones(5))


def test_parameters_live_in_one_fused_linear() -> None:
    head = head_of((2, 5, 3))
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {"linear.weight": (10, 6), "linear.bias": (10,)}
    assert isinstance(head.linear, nn.Linear)


def test_without_bias() -> None:
    head = head_of((2, 3), bias=False)
    assert [name for name, _ in head.named_parameters()] == ["linear.weight"]
    assert head.linear.bias is None


def test_configuration_is_readable() -> None:
    head = head_of([2, 5, 3])
    assert head.in_features == 6
    assert head.num_clusters == (2, 5, 3)
    assert "in_features=6" in repr(head)
    assert "num_clusters=(2, 5, 3)" in repr(head)


def test_agrees_with_the_functional_form() -> None:
    head, features = head_of((2, 5, 3)), torch.randn(4, 6)
    expected = functional.cluster_assignments(head.linear(features), (2, 5, 3))
    for got, wanted in zip(head(features), expected, strict=True):
        assert torch.equal(got, wanted)


class TestNormalize:
    def test_is_the_plain_head_on_features_of_length_sqrt_d(self) -> None:
        plain, head = head_of((2, 5)).double(), head_of((2, 5), normalize=True).double()
        assert "normalize=True" in repr(head)
        assert "normalize" not in repr(plain)
        features = random_embeddings(4, 6)
        lengths = [sum(x * x for x in row) ** 0.5 for row in rows(features)]
        scaled = torch.tensor(
            [
                [x * 6**0.5 / length for x in row]
                for row, length in zip(rows(features), lengths, strict=True)
            ],
            dtype=torch.float64,
        )
        torch.testing.assert_close(head(features), plain(scaled))
        torch.testing.assert_close(head.logits(features), plain.logits(scaled))

    @pytest.mark.parametrize("factor", [1e-30, 0.5, 1e30])
    def test_length_does_not_count(self, factor: float) -> None:
        head, features = head_of((2, 5), normalize=True), torch.randn(4, 6)
        torch.testing.assert_close(head(factor * features), head(features))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_zero_stays_zero_without_gradient(self, dtype: torch.dtype) -> None:
        head = head_of((2, 5), normalize=True)
        features = torch.zeros(3, 6, dtype=dtype, requires_grad=True)
        scores = head.logits(features)[1]
        torch.testing.assert_close(scores[0], head.linear.bias[2:])
        scores.square().sum().backward()
        assert features.grad is not None
        assert torch.equal(features.grad, torch.zeros_like(features))

    def test_gradient(self) -> None:
        head = head_of((2, 5), normalize=True).double()
        features = random_embeddings(4, 6).requires_grad_()
        assert torch.autograd.gradcheck(head, features)

    @pytest.mark.parametrize("wrong", [1, "yes", None])
    def test_type(self, wrong: Any, complains: Any) -> None:
        with complains(TypeError, "normalize", ("True or False",)):
            MultiScaleClusterHead(6, normalize=wrong)


def test_instances_do_not_influence_each_other() -> None:
    head, features = head_of((2, 5)).double(), random_embeddings(6, 6)
    alone = [head(features[i : i + 1])[1] for i in range(6)]
    torch.testing.assert_close(head(features)[1], torch.cat(alone))


def test_gradient_reaches_every_parameter_and_the_features() -> None:
    head = head_of((2, 5)).double()
    features = random_embeddings(4, 6).requires_grad_()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        state = {"linear.weight": weight, "linear.bias": bias}
        return torch.func.functional_call(head, state, (x,))

    leaves = (features, head.linear.weight.detach(), head.linear.bias.detach())
    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


def test_state_dict_moves_between_heads() -> None:
    first, second = head_of((2, 5)), MultiScaleClusterHead(6, (2, 5))
    second.load_state_dict(first.state_dict(), strict=True)
    features = torch.randn(3, 6)
    assert torch.equal(first(features)[0], second(features)[0])


INTEGER = ("int", "integer")


class TestErrors:
    @pytest.mark.parametrize("wrong", [(3, 1), (0,), [-4, 8]])
    def test_num_clusters_value(self, wrong: Any, complains: Any) -> None:
        received, expected = (f"got {min(wrong)}", f"got {wrong}"), ("at least 2", ">= 2")
        with complains(ValueError, "num_clusters", received, expected):
            MultiScaleClusterHead(6, wrong)

    @pytest.mark.parametrize("wrong", [(), []])
    def test_num_clusters_empty(self, wrong: Any, complains: Any) -> None:
        with complains(ValueError, "num_clusters", ("at least", "empty")):
            MultiScaleClusterHead(6, wrong)

    @pytest.mark.parametrize(
        "wrong", [32, 32.0, (32.0, 64), ("32",), "32", None, (True, 4), (None,)]
    )
    def test_num_clusters_type(self, wrong: Any, complains: Any) -> None:
        with complains(TypeError, "num_clusters", INTEGER):
            MultiScaleClusterHead(6, wrong)

    @pytest.mark.parametrize("wrong", [0, -1])
    def test_in_features_value(self, wrong: int, complains: Any) -> None:
        with complains(ValueError, "in_features", str(wrong), ("positive", "at least 1", ">= 1")):
            MultiScaleClusterHead(wrong)

    @pytest.mark.parametrize("wrong", [6.0, "6", None, True, (6,)])
    def test_in_features_type(self, wrong: Any, complains: Any) -> None:
        with complains(TypeError, "in_features", INTEGER):
            MultiScaleClusterHead(wrong)

    @pytest.mark.parametrize("method", ["forward", "logits"])
    @pytest.mark.parametrize("shape", [(6,), (2, 3, 6), ()])
    def test_rank(self, method: str, shape: tuple[int, ...], complains: Any) -> None:
        with complains(ValueError, "features", ", ".join(map(str, shape)), ("2-D", "(n, ")):
            getattr(head_of((2, 3)), method)(torch.rand(shape))

    @pytest.mark.parametrize("method", ["forward", "logits"])
    def test_width(self, method: str, complains: Any) -> None:
        with complains(ValueError, "features", "4, 5", "6"):
            getattr(head_of((2, 3)), method)(torch.rand(4, 5))

    @pytest.mark.parametrize("method", ["forward", "logits"])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_dtype(self, method: str, dtype: torch.dtype, complains: Any) -> None:
        with complains(TypeError, "features", str(dtype), "float"):
            getattr(head_of((2, 3)), method)(torch.ones(4, 6, dtype=dtype))

    @pytest.mark.parametrize("method", ["forward", "logits"])
    def test_not_a_tensor(self, method: str, complains: Any) -> None:
        with complains(TypeError, "features", "list", ("tensor", "Tensor")):
            getattr(head_of((2, 3)), method)([[1.0] * 6])
