"""Closed-form gradients against autograd of the formulas, where sharing and options differ."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune

from c2bin_ext import C2BINLoss, MultiScaleClusterHead, _fused, functional

# Loading forward-mode derivatives, torch warns of what it uses itself.
loads_forward_mode = pytest.mark.filterwarnings("ignore:`?torch.jit.script")

OPTIONS = [
    {"positive_in_denominator": positive, "symmetric": symmetric, "temperature": temperature}
    for positive, symmetric, temperature in itertools.product(
        (True, False), (True, False), (1 / 30, 0.5, 1.0, 2.0)
    )
]


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without the fused path: autograd of the formulas alone."""
    monkeypatch.setattr(_fused, "usable", lambda *_: False)
    return monkeypatch


def views(n: int = 9, k: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    first, second = (3 * torch.randn(2, n, k, generator=generator, dtype=dtype)).softmax(dim=2)
    return first.requires_grad_(), second.requires_grad_()


def gradients(loss: Any, inputs: Any, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_contrast_is_the_formula(options: dict[str, Any], formulas: pytest.MonkeyPatch) -> None:
    inputs = views()
    expected = functional.bca_contrastive_loss(*inputs, **options)
    expected_grads = gradients(3 * expected, inputs)
    formulas.undo()
    value = functional.bca_contrastive_loss(*inputs, **options)
    assert value.grad_fn is not None
    assert "CosineContrast" in value.grad_fn.name()
    torch.testing.assert_close(value, expected)
    for upstream in (False, True):
        found = gradients(3 * functional.bca_contrastive_loss(*inputs, **options), inputs,
                          create_graph=upstream)  # fmt: skip
        torch.testing.assert_close(found, expected_grads)


@pytest.mark.parametrize("empty", [False, True])
def test_balance_is_the_formula(empty: bool, formulas: pytest.MonkeyPatch) -> None:
    first, _ = views()
    if empty:
        first = first.detach().index_fill(1, torch.tensor([2]), 0.0).requires_grad_()
    expected = functional.cluster_entropy_regularizer(first)
    (expected_grad,) = gradients(3 * expected, first)
    formulas.undo()
    value = functional.cluster_entropy_regularizer(first)
    assert value.grad_fn is not None
    assert "BalanceGap" in value.grad_fn.name()
    torch.testing.assert_close(value, expected)
    for upstream in (False, True):
        (found,) = gradients(
            3 * functional.cluster_entropy_regularizer(first), first, create_graph=upstream
        )
        torch.testing.assert_close(found, expected_grad)


def gaps(matrices: Sequence[Tensor]) -> Tensor:
    return functional._balance_gaps([matrix.sum(dim=0) for matrix in matrices])


def heads_of_many_sizes() -> list[Tensor]:
    """Neighbours of equal and of unequal K, one with an empty cluster, one without any mass."""
    first, second = (view.detach().clone() for view in views(9, 4))
    third, fourth = (view.detach().clone() for view in views(9, 3))
    second[:, 1] = 0
    fourth *= 1e-15
    return [view.requires_grad_() for view in (first, second, third, fourth, views(9, 5)[0])]


def entropies(matrices: Sequence[Tensor]) -> Tensor:
    """Σ (log K - H), matrix by matrix, from Python's numbers."""
    total = torch.zeros((), dtype=torch.float64)
    for matrix in matrices:
        masses = [sum(matrix[i, k] for i in range(len(matrix))) for k in range(matrix.shape[1])]
        whole = sum(masses)
        for mass in masses:
            if whole > 1e-12 and mass > 0:
                share = mass / whole
                total = total + share * (share * len(masses)).log()
    return total


@pytest.mark.parametrize("create_graph", [False, True])
def test_balance_of_many_matrices(create_graph: bool) -> None:
    matrices = heads_of_many_sizes()
    value = gaps(matrices)
    assert value.grad_fn is not None
    assert "BalanceGaps" in value.grad_fn.name()
    expected = entropies(matrices)
    torch.testing.assert_close(value, expected)
    found = gradients(3 * value, matrices, create_graph=create_graph)
    # Without mass there is no gradient, and the oracle has none in an empty cluster.
    massive = [matrix for matrix in matrices if matrix.sum() > 1e-12]
    wanted = iter(gradients(3 * expected, massive))
    for gradient, matrix in zip(found, matrices, strict=True):
        if any(matrix is other for other in massive):
            used = matrix.sum(dim=0) > 0
            torch.testing.assert_close(gradient[:, used], next(wanted)[:, used])
        else:
            assert (gradient == 0).all()
    for gradient, matrix in zip(found, matrices, strict=True):
        alone = gradients(3 * functional.cluster_entropy_regularizer(matrix), matrix)
        torch.testing.assert_close(gradient, *alone)


@pytest.mark.parametrize("create_graph", [False, True])
def test_balance_of_many_matrices_some_without_gradient(create_graph: bool) -> None:
    matrices = heads_of_many_sizes()
    whole = gradients(gaps(matrices), matrices)
    some = [m if i in (0, 4) else m.detach() for i, m in enumerate(matrices)]
    value = gaps(some)
    found = gradients(value, [some[0], some[4]], create_graph=create_graph)
    torch.testing.assert_close(found, (whole[0], whole[4]))
    assert not gaps([m.detach() for m in matrices]).requires_grad


def test_balance_of_one_matrix_in_two_places() -> None:
    first, _ = views()
    (twice,) = gradients(gaps([first, first]), first)
    (once,) = gradients(functional.cluster_entropy_regularizer(first), first)
    torch.testing.assert_close(twice, 2 * once)
    assert torch.autograd.gradgradcheck(lambda x: gaps([x, x * x]), first)


def test_near_balance_no_row_is_negative() -> None:
    """Rounding must not let one matrix's gap go below 0 and hide another's."""
    for seed in range(50):
        torch.manual_seed(seed)
        near = [(1e-4 * torch.randn(64, k)).softmax(dim=1) for k in (7, 5)]
        both = gaps(near)
        alone = [functional.cluster_entropy_regularizer(view) for view in near]
        assert both >= max(alone) - 1e-12
        torch.testing.assert_close(both, alone[0] + alone[1], rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("shared", ["same", "computed", "twice"])
def test_one_view_made_from_the_other(shared: str, create_graph: bool) -> None:
    first, _ = views()
    second = {"same": lambda x: x, "computed": lambda x: x.flip(0), "twice": lambda x: x * 1}

    def loss(x: Tensor) -> Tensor:
        return functional.bca_contrastive_loss(x, second[shared](x))

    (found,) = gradients(loss(first), first, create_graph=create_graph)
    step = 1e-6
    for i, k in ((0, 0), (3, 2), (8, 3)):
        moved = torch.zeros_like(first)
        moved[i, k] = step
        with torch.no_grad():
            expected = (loss(first + moved) - loss(first - moved)) / (2 * step)
        assert abs(found[i, k] - expected) < 1e-8
    assert torch.autograd.gradgradcheck(loss, first)


def test_hooks_run_once_with_create_graph() -> None:
    for call in (functional.cluster_entropy_regularizer, functional.cluster_mass):
        first, _ = views()
        hooked = first * 1
        calls: list[Tensor] = []
        hooked.register_hook(calls.append)
        gradients(call(hooked).sum(), first, create_graph=True)
        assert len(calls) == 1


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_view_without_gradient(side: int, create_graph: bool) -> None:
    inputs = views()
    expected = gradients(functional.bca_contrastive_loss(*inputs), inputs)[side]
    one = [x if i == side else x.detach() for i, x in enumerate(inputs)]
    loss = functional.bca_contrastive_loss(*one)
    (found,) = gradients(2 * loss, inputs[side], create_graph=create_graph)
    torch.testing.assert_close(found, 2 * expected)


def test_batched_gradients() -> None:
    first, second = views()
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for loss in (
        functional.bca_contrastive_loss(first, second),
        functional.cluster_entropy_regularizer(first),
        gaps([first, second]),
    ):
        (single,) = gradients(loss, first, retain_graph=True)
        (batched,) = gradients(loss, first, grad_outputs=upstream, is_grads_batched=True)
        torch.testing.assert_close(batched, upstream[:, None, None] * single)


@loads_forward_mode
def test_second_derivative_near_balance_is_not_lost() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        view = (1e-5 * torch.randn(8, 3)).softmax(dim=1)
        hessian = torch.func.hessian(functional.cluster_entropy_regularizer)(view)
        assert hessian.abs().max() > 0.01


@loads_forward_mode
def test_forward_mode_of_half_inputs() -> None:
    first, second = (view.detach().half() for view in views())
    for call in (functional.bca_contrastive_loss, functional.bootstrap_alignment_loss):
        _, slope = torch.func.jvp(lambda x, call=call: call(x, second), (first,), (second,))
        assert torch.isfinite(slope)


def test_scaler_sees_overflow() -> None:
    """A gradient that float16 cannot hold has to reach GradScaler as inf: it lowers the scale."""
    prediction = torch.randn(2, 8).half().requires_grad_()
    loss = functional.bootstrap_alignment_loss(prediction, torch.randn(2, 8).half())
    (gradient,) = gradients(loss * 2.0**24, prediction)
    assert not torch.isfinite(gradient).all()


class Doubled(nn.Linear):
    """A wrapper such as those of adapters and pruning: its forward is not its weight alone."""

    def forward(self, features: Tensor) -> Tensor:
        return 2 * super().forward(features)


def test_head_calls_its_linear() -> None:
    head, features = MultiScaleClusterHead(4, (2, 3)), torch.randn(5, 4)
    expected = head.logits(features)
    wrapped = Doubled(4, 5)
    wrapped.load_state_dict(head.linear.state_dict())
    head.linear = wrapped
    for found, single in zip(head.logits(features), expected, strict=True):
        torch.testing.assert_close(found, 2 * single)


def test_pruned_head_trains() -> None:
    head = MultiScaleClusterHead(4, (2, 3))
    prune.l1_unstructured(head.linear, "weight", amount=0.5)
    criterion, x = C2BINLoss(), torch.randn(6, 4)
    for _ in range(2):
        criterion((x, x), (x, x), (head(x), head(x))).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_balance_formula_of_empty_clusters_and_near_balance(
    dtype: torch.dtype, formulas: pytest.MonkeyPatch
) -> None:
    empty = torch.zeros(4, 3, dtype=dtype)
    empty[:, 0] = 1
    empty.requires_grad_()
    value = functional.cluster_entropy_regularizer(empty)
    torch.testing.assert_close(value, torch.tensor(3.0, dtype=dtype).log())
    assert torch.isfinite(gradients(value, empty)[0]).all()
    for seed in range(50):
        torch.manual_seed(seed)
        near = (1e-4 * torch.randn(64, 7, dtype=dtype)).softmax(dim=1)
        assert functional.cluster_entropy_regularizer(near) >= 0


def test_balance_of_empty_clusters_is_the_formula(formulas: pytest.MonkeyPatch) -> None:
    inputs = functional.cluster_assignments(torch.tensor([[0.0, 1.0, -1e4], [2.0, 0.0, -1e4]]), [3])
    empty = inputs[0].requires_grad_()
    expected = gradients(functional.cluster_entropy_regularizer(empty), empty)
    formulas.undo()
    found = gradients(functional.cluster_entropy_regularizer(empty), empty)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("symmetric_alignment", [True, False])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_losses_from_sums_over_ranks(
    similarity: str, symmetric_alignment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks with the same shard: the sums double, and the batch is the shard twice over."""
    (first, second), (third, fourth) = views(9, 4), views(9, 3)
    x, y, z, w = torch.randn(4, 9, 5, dtype=torch.float64)
    shard = ((x, y), (z, w), ((first, third), (second, fourth)))

    def twice(tree: Any) -> Any:
        return torch.cat([tree, tree]) if isinstance(tree, Tensor) else tuple(map(twice, tree))

    options: dict[str, Any] = {"similarity": similarity, "reduction": "sum"}
    calls = [
        lambda given, **more: functional.c2bin_loss(
            *given, **options, symmetric_alignment=symmetric_alignment, **more
        ),
        lambda given, **more: functional.bca_contrastive_loss(
            given[2][0][0], given[2][1][0], similarity=similarity, **more
        ),
        lambda given, **more: functional.cluster_entropy_regularizer(
            given[2][0][0], reduction="sum", **more
        ),
        lambda given, **more: functional.bootstrap_alignment_loss(given[0][0], given[1][0], **more),
    ]
    expected = [call(twice(shard)) for call in calls]
    local = [call(shard) for call in calls]
    monkeypatch.setattr(functional, "world_size", lambda: 2)
    monkeypatch.setattr(functional, "sum_over_ranks", lambda sums: [2 * part for part in sums])
    for call, value, alone in zip(calls, expected, local, strict=True):
        torch.testing.assert_close(call(shard, gather_distributed=True), value)
        torch.testing.assert_close(call(shard), alone)


@loads_forward_mode
@pytest.mark.parametrize("side", [0, 1])
def test_forward_mode_without_functional_transforms(side: int) -> None:
    inputs = [view.detach() for view in views()]
    tangent = torch.randn_like(inputs[side])
    step = 1e-6

    def moved(by: float) -> list[Tensor]:
        return [x + by * tangent if i == side else x for i, x in enumerate(inputs)]

    calls = [lambda pair: functional.bca_contrastive_loss(*pair)]
    calls += [lambda pair: functional.cluster_entropy_regularizer(pair[side])]
    for call in calls:
        expected = (call(moved(step)) - call(moved(-step))) / (2 * step)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[side], tangent)
            value = call([dual if i == side else x for i, x in enumerate(inputs)])
            found = forward_ad.unpack_dual(value).tangent
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_formula_gives_empty_columns_no_gradient(formulas: pytest.MonkeyPatch) -> None:
    first, second = (view.detach().clone() for view in views())
    first[:, 1] = 0
    first.requires_grad_()
    (found,) = gradients(functional.bca_contrastive_loss(first, second), first)
    assert (found[:, 1] == 0).all()
    assert (found[:, 0] != 0).any()


def test_each_view_has_the_floor_of_its_own_dtype() -> None:
    """A column (or a row) of 1e-6 is empty in float16 and has a direction in float32."""
    full = torch.full((4, 3), 1 / 3)
    short = full.clone()
    short[:, 0] = 1e-6
    for pair in ((short.half(), full), (full, short.half())):
        value = functional.bca_contrastive_loss(*pair)
        emptied = [x.float().where(x > 1e-4, 0) for x in pair]
        torch.testing.assert_close(value, functional.bca_contrastive_loss(*emptied), rtol=1e-3,
                                   atol=1e-3)  # fmt: skip
    for pair in ((short, full.half()), (full.half(), short)):
        value = functional.bca_contrastive_loss(*pair)
        torch.testing.assert_close(value, torch.tensor(3.0).log(), rtol=1e-3, atol=1e-3)
    tiny = torch.full((2, 3), 1e-6)
    one = torch.ones(2, 3)
    for pair, expected in (
        ((tiny.half(), one), 1.0),
        ((one, tiny.half()), 1.0),
        ((tiny, one.half()), 0.0),
        ((one.half(), tiny), 0.0),
    ):
        value = functional.bootstrap_alignment_loss(*pair)
        torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-5, atol=1e-5)
