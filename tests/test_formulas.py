"""Gradients of the formulas, of every order and by every kind of differentiation torch has.

An eager step has closed-form gradients, `create_graph=True` and forward mode have autograd's of the
formula: each is compared with the other and with differences of values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    CONTRASTS,
    HEADS,
    Case,
    close,
    evaluate,
    leaves,
    over,
    random_assignments,
    scalar,
)
from helpers import Recorder
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_flatten, tree_unflatten

from c2bin_ext import _formulas
from c2bin_ext.functional import (
    bca_contrastive_loss,
    bootstrap_alignment_loss,
    cluster_entropy_regularizer,
    multi_scale_cluster_loss,
)

# Loading forward-mode derivatives, torch warns of what it uses itself.
loads_forward_mode = pytest.mark.filterwarnings("ignore:`?torch.jit.script")
create_graph = pytest.mark.parametrize("create_graph", [False, True])
contrasts = pytest.mark.parametrize("options", CONTRASTS.values(), ids=CONTRASTS)


def views(n: int = 9, k: int = 4) -> tuple[Tensor, Tensor]:
    return tuple(random_assignments(n, k, n + k + i).requires_grad_() for i in range(2))


def differences(
    function: Callable[..., Tensor], inputs: list[Tensor], tangents: list[Tensor]
) -> Tensor:
    step = 1e-6
    above, below = (
        function(*(x.detach() + s * t for x, t in zip(inputs, tangents, strict=True)))
        for s in (step, -step)
    )
    return (above - below) / (2 * step)


class TestEveryForm:
    @over()
    def test_create_graph_changes_no_gradient(self, case: Case) -> None:
        module, arguments = case.build(), case.arguments(5)
        plain, graph = (evaluate(module, arguments, create_graph=flag) for flag in (False, True))
        close(plain[0], graph[0], 0)
        for found, wanted in zip(graph[1], plain[1], strict=True):
            close(found, wanted, 1e-11)

    @over()
    def test_gradcheck(self, case: Case) -> None:
        function, inputs = flattened(case)
        assert gradcheck(function, inputs)

    @over("second derivatives")
    def test_second_derivatives(self, case: Case) -> None:
        function, inputs = flattened(case)
        # Along a random direction of the inputs and of the gradients: all entries at once.
        assert gradgradcheck(function, inputs, fast_mode=True)

    @loads_forward_mode
    @over("func")
    def test_forward_mode(self, case: Case) -> None:
        function, inputs = flattened(case)
        tangents = [torch.randn_like(leaf) for leaf in inputs]
        expected = differences(function, inputs, tangents)
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(leaf.detach(), tangent)
                for leaf, tangent in zip(inputs, tangents, strict=True)
            ]
            found = forward_ad.unpack_dual(function(*duals)).tangent
        close(found, expected, 1e-7)

    @over()
    def test_the_incoming_gradient_scales_it(self, case: Case) -> None:
        module, (live, inputs) = case.build(), leaves(case.arguments(5))
        value = scalar(module(*live))
        plain = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        scaled = torch.autograd.grad(-3.0 * value, inputs, allow_unused=True)
        for found, wanted in zip(scaled, plain, strict=True):
            assert (found is None) == (wanted is None)
            if found is not None:
                close(found, -3.0 * wanted)

    @over()
    def test_each_input_alone_has_the_gradient_it_has_among_all(self, case: Case) -> None:
        module, arguments = case.build(), case.arguments(4)
        tensors, structure = tree_flatten(arguments)
        _, expected = evaluate(module, arguments)
        for position, wanted in enumerate(expected[: len(tensors)]):
            own = [t.clone().requires_grad_(i == position) for i, t in enumerate(tensors)]
            value = scalar(module(*tree_unflatten(own, structure)))
            if value.requires_grad:
                (found,) = torch.autograd.grad(value, own[position], allow_unused=True)
                close(torch.zeros_like(wanted) if found is None else found, wanted)
            else:
                assert not wanted.any()

    @over()
    def test_batched_gradients(self, case: Case) -> None:
        module, (live, inputs) = case.build(), leaves(case.arguments(4))
        value = scalar(module(*live))
        upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
        used = [
            (leaf, found)
            for leaf, found in zip(
                inputs,
                torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True),
                strict=True,
            )
            if found is not None
        ]
        batched = torch.autograd.grad(
            value, [leaf for leaf, _ in used], grad_outputs=upstream, is_grads_batched=True
        )
        for found, (_, single) in zip(batched, used, strict=True):
            close(found, upstream[:, None, None] * single)


def flattened(case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A row as a function of the tensors that get a gradient, with n = 3 and two heads."""
    module, arguments = case.build(), case.arguments(3, heads=HEADS[:1] + HEADS[2:])
    trained = [a for i, a in enumerate(arguments) if i not in case.frozen]
    tensors, structure = tree_flatten(trained)

    def function(*inputs: Tensor) -> Tensor:
        live = iter(tree_unflatten(list(inputs), structure))
        return scalar(
            module(*(a if i in case.frozen else next(live) for i, a in enumerate(arguments)))
        )

    return function, [tensor.clone().requires_grad_() for tensor in tensors]


class TestSharing:
    @create_graph
    @contrasts
    @pytest.mark.parametrize("how", ["same", "flipped", "copied"])
    def test_one_view_made_from_the_other(
        self, how: str, options: dict[str, Any], create_graph: bool
    ) -> None:
        made = {"same": lambda x: x, "flipped": lambda x: x.flip(0), "copied": lambda x: x * 1}

        def loss(x: Tensor) -> Tensor:
            return bca_contrastive_loss(x, made[how](x), **options)

        first, _ = views()
        (found,) = torch.autograd.grad(loss(first), first, create_graph=create_graph)
        tangent = torch.randn_like(first)
        close((found * tangent).sum().detach(), differences(loss, [first], [tangent]), 1e-6)

    def test_second_derivative_of_shared_views(self) -> None:
        first, _ = views()
        assert gradgradcheck(lambda x: bca_contrastive_loss(x, x.flip(0)), first)
        assert gradgradcheck(
            lambda x: multi_scale_cluster_loss(([x, x * x], [x, x.flip(1)])).loss, first
        )

    def test_one_matrix_in_two_places(self) -> None:
        first, _ = views()
        twice = multi_scale_cluster_loss(([first, first], [first, first])).entropy
        (found,) = torch.autograd.grad(twice, first)
        (once,) = torch.autograd.grad(cluster_entropy_regularizer(first), first)
        close(found, 2 * once)

    def test_hooks_run_once_with_create_graph(self) -> None:
        for call in (cluster_entropy_regularizer, lambda x: bca_contrastive_loss(x, views()[1])):
            hooked = views()[0] * 1
            calls: list[Tensor] = []
            hooked.register_hook(calls.append)
            torch.autograd.grad(call(hooked), hooked, create_graph=True)
            assert len(calls) == 1


class TestWhatAStepKeeps:
    @over()
    def test_gradients_are_the_same_where_no_value_may_be_read(self, case: Case) -> None:
        module, arguments = case.build(), case.arguments(5)
        _, expected = evaluate(module, arguments)
        with Recorder():
            _, found = evaluate(module, arguments)
        close(found, expected, 1e-12)

    @pytest.mark.parametrize("name", ["contrast", "contrast dot, positive left out, one way"])
    @pytest.mark.parametrize("whole", [False, True])
    def test_one_gram_matrix(self, name: str, whole: bool) -> None:
        kept: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if whole:
                heads = [[view] for view in views(3, 16)]
                multi_scale_cluster_loss(heads, **CONTRASTS[name])
            else:
                bca_contrastive_loss(*views(3, 16), **CONTRASTS[name])
        assert kept.count(16 * 16) == 1
        assert max(kept) == 16 * 16


class TestTiles:
    @contrasts
    @pytest.mark.parametrize("tile", [1, 5, 12, 20])
    def test_a_large_head_is_worked_on_some_rows_at_a_time(
        self, tile: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = list(views(9, 5))
        value = bca_contrastive_loss(*inputs, **options)
        whole = torch.autograd.grad(value, inputs)
        monkeypatch.setattr(_formulas, "_TILE", tile)  # 1, 1, 2 and 4 of its 5 rows
        tiled = bca_contrastive_loss(*inputs, **options)
        close(tiled.detach(), value.detach())
        close(list(torch.autograd.grad(tiled, inputs)), list(whole))


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dot_products_of_any_size(positive: bool, symmetric: bool) -> None:
    """S is about a thousand: exp(S) is infinite, also in float64."""
    heads = tuple([random_assignments(64, k, seed + k) for k in (3, 5)] for seed in (0, 50))
    inputs = [head.requires_grad_() for view in heads for head in view]
    options: dict[str, Any] = {"positive_in_denominator": positive, "symmetric": symmetric}
    options |= {"similarity": "dot", "temperature": 0.002, "entropy_weight": 0.0}
    found = multi_scale_cluster_loss(heads, **options).loss
    expected = found.new_zeros(())
    for first, second in zip(*heads, strict=True):
        logits = first.T @ second / 0.002
        assert logits.detach().max() > 1000
        directions = (logits, logits.T)[: 1 + symmetric]
        for scores, k in itertools.product(directions, range(len(logits))):
            row = scores[k] if positive else torch.cat([scores[k, :k], scores[k, k + 1 :]])
            share = len(logits) * len(directions)
            expected = expected + (row.logsumexp(0) - scores[k, k]) / share
    close(found.detach(), expected.detach(), 1e-9)
    close(*(list(torch.autograd.grad(x, inputs)) for x in (found, expected)), 1e-8)


class TestTemperatures:
    @pytest.mark.parametrize(
        ("positive", "symmetric", "temperature"),
        [*itertools.product((True, False), (True, False), (1e-3, 0.033, 1 / 30, 0.034, 0.5, 2.0))],
    )
    def test_gradient(self, positive: bool, symmetric: bool, temperature: float) -> None:
        options: dict[str, Any] = {"positive_in_denominator": positive, "symmetric": symmetric}
        options |= {"temperature": temperature}

        def loss(*pair: Tensor) -> Tensor:
            return bca_contrastive_loss(*pair, **options)

        inputs = list(views())
        value = loss(*inputs)
        plain = torch.autograd.grad(value, inputs, retain_graph=True)
        graph = torch.autograd.grad(value, inputs, create_graph=True)
        close([g.detach() for g in graph], list(plain), 1e-9)
        tangents = [torch.randn_like(x) for x in inputs]
        slope = sum((g * t).sum() for g, t in zip(plain, tangents, strict=True))
        close(slope, differences(loss, inputs, tangents), 1e-5 if temperature > 0.01 else 1e-2)


def heads_of_many_sizes() -> list[Tensor]:
    """Neighbours of equal and of unequal K, one with an empty cluster, one without any mass."""
    first, second = (view.detach() for view in views(9, 4))
    third, fourth = (view.detach() for view in views(9, 3))
    second[:, 1] = 0
    fourth *= 1e-15
    return [view.requires_grad_() for view in (first, second, third, fourth, views(9, 5)[0])]


def entropy(matrices: list[Tensor]) -> Tensor:
    return multi_scale_cluster_loss((matrices, matrices)).entropy


class TestEntropiesOfManyHeads:
    @create_graph
    def test_are_those_of_each_head(self, create_graph: bool) -> None:
        matrices = heads_of_many_sizes()
        whole = entropy(matrices)
        singles = [cluster_entropy_regularizer(matrix) for matrix in matrices]
        close(whole.detach(), sum(singles).detach())
        found = torch.autograd.grad(3 * whole, matrices, create_graph=create_graph)
        for gradient, single, matrix in zip(found, singles, matrices, strict=True):
            close(gradient.detach(), torch.autograd.grad(3 * single, matrix)[0])
        assert not found[3].any(), "without any mass there is no gradient"

    @create_graph
    def test_some_without_gradient(self, create_graph: bool) -> None:
        matrices = heads_of_many_sizes()
        whole = torch.autograd.grad(entropy(matrices), matrices)
        some = [m if i in (0, 4) else m.detach() for i, m in enumerate(matrices)]
        found = torch.autograd.grad(entropy(some), [some[0], some[4]], create_graph=create_graph)
        close([g.detach() for g in found], [whole[0], whole[4]])
        assert not entropy([m.detach() for m in matrices]).requires_grad

    def test_near_balance_no_head_is_negative(self) -> None:
        """Rounding must not let one head's gap go below 0 and hide another's."""
        for seed in range(50):
            near = [(1e-4 * random_assignments(64, k, seed).float()).softmax(1) for k in (7, 5)]
            both = entropy(near)
            # As torch.func sees it, which the closed form does not serve.
            assert all(torch.vmap(cluster_entropy_regularizer)(v[None]) >= 0 for v in near)
            alone = [cluster_entropy_regularizer(view) for view in near]
            assert both >= max(alone) - 1e-12
            torch.testing.assert_close(both, alone[0] + alone[1], rtol=1e-3, atol=2e-7)

    @create_graph
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_empty_clusters(self, dtype: torch.dtype, create_graph: bool) -> None:
        empty = torch.zeros(4, 3, dtype=dtype)
        empty[:, 0] = 1
        empty.requires_grad_()
        value = cluster_entropy_regularizer(empty)
        torch.testing.assert_close(value, torch.tensor(3.0, dtype=dtype).log())
        (found,) = torch.autograd.grad(value, empty, create_graph=create_graph)
        assert torch.isfinite(found).all()
        assert found[0, 1] < found[0, 0], "descent gives an empty cluster mass"

    @loads_forward_mode
    def test_second_derivative_near_balance_is_not_lost(self) -> None:
        for seed in range(20):
            view = (1e-5 * random_assignments(8, 3, seed).float()).softmax(dim=1)
            hessian = torch.func.hessian(cluster_entropy_regularizer)(view)
            assert hessian.abs().max() > 0.01


class TestEmptyColumns:
    @create_graph
    @contrasts
    def test_cosines_give_them_no_gradient(
        self, options: dict[str, Any], create_graph: bool
    ) -> None:
        first, second = (view.detach() for view in views())
        first[:, 1] = 0
        first.requires_grad_()
        value = bca_contrastive_loss(first, second, **options)
        (found,) = torch.autograd.grad(value, first, create_graph=create_graph)
        assert bool((found[:, 1] == 0).all()) == (options.get("similarity") != "dot")
        assert (found[:, 0] != 0).any()


@loads_forward_mode
def test_forward_mode_of_half_inputs() -> None:
    first, second = (view.detach().half() for view in views())
    for call in (bca_contrastive_loss, bootstrap_alignment_loss):
        slope = torch.func.jvp(lambda x, call=call: call(x, second), (first,), (second,))[1]
        wide = [first.double(), second.double()]
        expected = differences(lambda x, c=call, y=wide[1]: c(x, y), wide[:1], wide[1:])
        torch.testing.assert_close(slope.double(), expected, rtol=2e-2, atol=2e-3)


def test_scaler_sees_overflow() -> None:
    """A gradient that float16 cannot hold has to reach GradScaler as inf: it lowers the scale."""
    prediction = torch.randn(2, 8).half().requires_grad_()
    loss = bootstrap_alignment_loss(prediction, torch.randn(2, 8).half())
    (gradient,) = torch.autograd.grad(loss * 2.0**24, prediction)
    assert not torch.isfinite(gradient).all()
