"""The multi-scale head: one linear map, split and normalised per scale."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from cases import described, random_embeddings
from helpers import signature
from oracle import rows
from torch import Tensor, nn
from torch.nn.utils import prune

from c2bin_ext import C2BINLoss, MultiScaleClusterHead, functional

SCALES = [(2,), (2, 5, 3), (4, 4)]


def head_of(num_clusters: Any, d: int = 6, **options: Any) -> MultiScaleClusterHead:
    torch.manual_seed(0)
    return MultiScaleClusterHead(d, num_clusters, **options)


def test_signature() -> None:
    assert signature(MultiScaleClusterHead)[1:] == [
        ("num_clusters", (32, 64, 128)),
        ("bias", True),
        ("normalize", False),
        ("hidden_features", None),
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


class Doubled(nn.Linear):
    """A wrapper such as those of adapters and pruning: its forward is not its weight only."""

    def forward(self, features: Tensor) -> Tensor:
        return 2 * super().forward(features)


@pytest.mark.parametrize("hidden", [None, 6])
def test_head_calls_its_linear(hidden: int | None) -> None:
    head = head_of((2, 3), hidden_features=hidden).eval()
    features = torch.randn(5, 6)
    expected = head.logits(features)
    wrapped = Doubled(6, 5)
    wrapped.load_state_dict(head.linear.state_dict())
    head.linear = wrapped
    for found, single in zip(head.logits(features), expected, strict=True):
        torch.testing.assert_close(found, 2 * single)


def test_pruned_head_trains() -> None:
    head = head_of((2, 3))
    prune.l1_unstructured(head.linear, "weight", amount=0.5)
    x, before = torch.randn(6, 6), head.linear.weight_orig.detach().clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        C2BINLoss()((x, x), (x, x), (head(x), head(-x))).loss.backward()
        optimizer.step()
    assert not torch.equal(head.linear.weight_orig, before)


class TestHidden:
    """Values, gradients and precision are those of every form's tests."""

    def test_layers(self) -> None:
        head = head_of((2, 5), hidden_features=4)
        assert head.linear.weight.shape == (7, 4)
        kinds = [type(m) for m in head.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d)]
        assert sorted(kind.__name__ for kind in kinds) == ["BatchNorm1d", "Linear", "Linear"]
        assert [*dict(head.hidden.named_parameters())] == ["0.weight", "1.weight", "1.bias"]
        assert "hidden_features=4" in repr(head)
        assert "hidden_features" not in repr(head_of((2, 5)))

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_logits(self, normalize: bool, training: bool) -> None:
        head = head_of((2, 5), hidden_features=4, normalize=normalize).double()
        head(random_embeddings(9, 6, 3))
        head.train(training)
        features = random_embeddings(5, 6)
        expected = oracle.scores(rows(features), described(head))
        for found, wanted in zip(head.logits(features), expected, strict=True):
            torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))

    def test_running_statistics_move_in_training_only(self) -> None:
        head = head_of((2, 5), hidden_features=4).double()
        (norm,) = (m for m in head.modules() if isinstance(m, nn.BatchNorm1d))
        (layer,) = (m for m in head.modules() if isinstance(m, nn.Linear) and m is not head.linear)
        features = random_embeddings(5, 6)
        outputs = layer(features).detach()
        head(features)
        torch.testing.assert_close(norm.running_mean, 0.1 * outputs.mean(dim=0))
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * outputs.var(dim=0))
        assert int(norm.num_batches_tracked) == 1
        before = {name: value.clone() for name, value in head.state_dict().items()}
        head.eval()(2 * features)
        assert all(torch.equal(before[name], v) for name, v in head.state_dict().items())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_running_statistics_of_half_parameters(self, dtype: torch.dtype) -> None:
        """What a head learns of its features serves evaluation in half precision too."""
        head = head_of((2, 5), hidden_features=4).to(dtype)
        features = 3 + random_embeddings(64, 6, 0, dtype)
        for _ in range(40):
            trained = head(features)
        evaluated = head.eval()(features)
        torch.testing.assert_close(evaluated, trained, rtol=0.1, atol=0.05)

    def test_one_instance(self, complains: Any) -> None:
        head = head_of((2, 5), hidden_features=4)
        for call in (head, head.logits):
            with complains(ValueError, "features", "(1, 6)"):
                call(torch.rand(1, 6))
        assert head.eval()(torch.rand(1, 6))[0].shape == (1, 2)

    @pytest.mark.parametrize("wrong", [0, -3])
    def test_value(self, wrong: int, complains: Any) -> None:
        with complains(ValueError, f"hidden_features: expected an int >= 1, got {wrong}"):
            MultiScaleClusterHead(6, hidden_features=wrong)

    @pytest.mark.parametrize("wrong", [4.0, "4", True, (4,)])
    def test_type(self, wrong: Any, complains: Any) -> None:
        with complains(TypeError, "hidden_features: expected an int >= 1", type(wrong).__name__):
            MultiScaleClusterHead(6, hidden_features=wrong)


def test_what_repr_says() -> None:
    plain, full = (
        MultiScaleClusterHead(6),
        MultiScaleClusterHead(6, normalize=True, hidden_features=4),
    )
    assert plain.extra_repr() == "in_features=6, num_clusters=(32, 64, 128)"
    assert full.extra_repr() == f"{plain.extra_repr()}, normalize=True, hidden_features=4"
