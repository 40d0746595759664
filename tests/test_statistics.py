"""Sums over instances: they add up over micro-batches, and carry the gradient of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    TABLE_5,
    Case,
    close,
    evaluate,
    flat,
    leaves,
    over,
    random_assignments,
    scalar,
)
from helpers import signature
from torch import Tensor
from torch.utils._pytree import tree_map

from c2bin_ext import C2BINLoss
from c2bin_ext.functional import c2bin_loss, c2bin_statistics
from c2bin_ext.statistics import BatchStatistics, HeadStatistics, at_value_of

MICRO = over(where=lambda case: case.micro)
N = 24


def cut(tree: Any, sizes: tuple[int, ...]) -> list[Any]:
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [
        tree_map(lambda t, a=stop - size, b=stop: t[a:b], tree)
        for size, stop in zip(sizes, stops, strict=True)
    ]


def in_parts(
    loss: Any, arguments: Any, sizes: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """The values of every micro-batch, and the sum of their gradients."""
    live, inputs = leaves(arguments)
    inputs += loss.parameters()
    parts = cut(live, sizes)
    total = sum(loss.statistics(*part) for part in parts)
    assert not total.requires_grad
    outputs = [loss(*part, statistics=total) for part in parts]
    found = torch.autograd.grad(sum(map(scalar, outputs)), inputs, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]
    return [flat(output).detach() for output in outputs], zeros


class TestMicroBatches:
    @MICRO
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str
    )
    @pytest.mark.parametrize("sizes", [(8, 8, 8), (1, 16, 7), (24,)], ids=str)
    def test_are_the_batch(
        self, case: Case, dtype: torch.dtype, tolerance: float, sizes: tuple[int, ...]
    ) -> None:
        loss, arguments = case.build().to(dtype).loss, case.arguments(N, dtype)
        expected = evaluate(loss, arguments)
        values, gradients = in_parts(loss, arguments, sizes)
        for value in values:
            close(value, expected[0], tolerance)
        close(gradients, expected[1], tolerance)

    @MICRO
    def test_statistics_add_up_in_any_order(self, case: Case) -> None:
        loss, arguments = case.build().loss, case.arguments(N)
        whole = loss.statistics(*arguments)
        assert whole.ndim == 1
        assert whole.dtype is torch.float64
        first, second = (loss.statistics(*part) for part in cut(arguments, (9, 15)))
        close(second + first, whole)
        shuffled = tree_map(lambda t: t.flip(0), arguments)
        close(loss.statistics(*shuffled), whole)

    @MICRO
    def test_statistics_of_the_batch_itself_change_nothing(self, case: Case) -> None:
        loss, arguments = case.build().loss, case.arguments(N)
        given = loss.statistics(*arguments)
        close(evaluate(lambda *a: loss(*a, statistics=given), arguments)[0],
              evaluate(loss, arguments)[0])  # fmt: skip

    @MICRO
    def test_half_inputs_are_summed_in_float32(self, case: Case) -> None:
        loss, arguments = case.build().float().loss, case.arguments(N, torch.bfloat16)
        total = loss.statistics(*arguments)
        assert total.dtype is torch.float32
        close(total, loss.statistics(*tree_map(Tensor.float, arguments)), 1e-5)
        close(loss(*arguments, statistics=total), loss(*arguments), 1e-5)

    @MICRO
    def test_sums_of_more_precision_leave_the_loss_as_it_is(self, case: Case) -> None:
        loss, arguments = case.build().float().loss, case.arguments(N, torch.float32)
        total = loss.statistics(*arguments)
        found, expected = (loss(*arguments, statistics=t) for t in (total.double(), total))
        assert flat(found).dtype is torch.float32
        close(found, expected, 1e-6)

    def test_heads_that_share_operators_beside_large_ones(self) -> None:
        """Heads of at most 256 clusters make one group, each larger one its own."""
        loss, sizes = C2BINLoss(), (3, 257, 5, 260)
        heads = [[random_assignments(N, k, k + view) for k in sizes] for view in range(2)]
        embeddings = tuple(torch.randn(2, N, 4, dtype=torch.float64).unbind())
        arguments = (embeddings, embeddings[::-1], heads)
        expected = evaluate(loss, arguments)
        values, gradients = in_parts(loss, arguments, (9, 15))
        for value in values:
            close(value, expected[0])
        close(gradients, expected[1])

    @MICRO
    def test_other_statistics_change_the_loss(self, case: Case) -> None:
        loss, arguments = case.build().loss, case.arguments(N)
        other = loss.statistics(*case.arguments(N, seed=1000))
        assert abs(loss(*arguments, statistics=other).loss - loss(*arguments).loss) > 1e-3


class TestFunctions:
    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    @pytest.mark.parametrize("symmetric_alignment", [True, False])
    def test_modules_hand_on_their_options(
        self, similarity: str, symmetric_alignment: bool
    ) -> None:
        predictions, targets, heads, fixed = CASES["objective and follower"].arguments()
        inputs = (predictions, targets, heads)
        options: dict[str, Any] = {
            "similarity": similarity,
            "symmetric_alignment": symmetric_alignment,
        }
        for given in (None, fixed):
            expected = c2bin_statistics(*inputs, **options, target_assignments=given)
            close(C2BINLoss(**options).statistics(*inputs, given), expected, 0)

    def test_one_direction_does_not_read_the_other(self) -> None:
        (first, _), (_, second), heads = CASES["objective"].arguments()
        given: Any = ((first, None), (None, second), heads)
        expected = c2bin_loss((first, first), (second, second), heads, symmetric_alignment=False)
        close(c2bin_loss(*given, symmetric_alignment=False), expected, 0)
        close(
            c2bin_statistics(*given, symmetric_alignment=False),
            c2bin_statistics((first, first), (second, second), heads, symmetric_alignment=False),
            0,
        )

    def test_defaults_are_those_of_the_loss(self) -> None:
        loss = dict(signature(c2bin_loss))
        for name, default in signature(c2bin_statistics):
            assert default == loss[name]

    def test_paper_needs_no_norms(self) -> None:
        inputs = CASES["paper"].arguments()
        printed = C2BINLoss.paper().statistics(*inputs)
        assert len(printed) < len(C2BINLoss(**TABLE_5).statistics(*inputs))

    def test_at_value_of(self) -> None:
        own = torch.tensor([2.0, 3.0], requires_grad=True)
        total = torch.tensor([5.0, 7.0], requires_grad=True)
        value = at_value_of(own, total)
        assert value.tolist() == [5.0, 7.0]
        on_own, on_total = torch.autograd.grad((value**2).sum(), (own, total), allow_unused=True)
        assert on_own.tolist() == [10.0, 14.0]
        assert on_total is None

    def test_classes_are_documented(self) -> None:
        for item in (BatchStatistics, HeadStatistics):
            assert item.__module__ == "c2bin_ext.statistics"
            assert len(item.__doc__ or "") > 20


class TestErrors:
    def test_objective(self, complains: Any) -> None:
        outputs = tree_map(Tensor.float, CASES["objective"].arguments(8))
        total = c2bin_statistics(*outputs)
        with complains(
            ValueError,
            f"statistics: expected shape ({len(total)},) as c2bin_statistics returns for the same "
            f"heads and options, got shape ({len(total) + 1},)",
        ):
            c2bin_loss(*outputs, statistics=torch.zeros(len(total) + 1))
        with complains(
            TypeError, "statistics: expected a vector as c2bin_statistics returns, got list"
        ):
            c2bin_loss(*outputs, statistics=total.tolist())
        with complains(
            TypeError,
            "statistics: expected floating-point sums as c2bin_statistics returns, got torch.int64",
        ):
            c2bin_loss(*outputs, statistics=total.long())
        with complains(
            ValueError, "statistics: expected device cpu as the batch has, got device meta"
        ):
            c2bin_loss(*outputs, statistics=total.to("meta"))
        with complains(ValueError, "statistics", "finite", "1 NaN"):
            nan = total.index_fill(0, torch.tensor([2]), math.nan)
            c2bin_loss(*outputs, statistics=nan, validate_args=True)
        assert c2bin_loss(*outputs, statistics=nan).loss.isnan()

    @MICRO
    def test_statistics_of_other_options(self, case: Case, complains: Any) -> None:
        loss, arguments = case.build().loss, case.arguments()
        short = loss.statistics(*arguments)[:-1]
        with complains(ValueError, "statistics", f"({len(short)},)"):
            loss(*arguments, statistics=short)

    def test_values_are_checked_on_demand_only(self, complains: Any) -> None:
        outputs = tree_map(torch.clone, CASES["objective"].arguments(8))
        outputs[0][0][0, 0] = math.nan
        assert c2bin_statistics(*outputs).isnan().any()
        assert C2BINLoss().statistics(*outputs).isnan().any()
        for check in (
            C2BINLoss(validate_args=True).statistics,
            lambda *given: c2bin_statistics(*given, validate_args=True),
        ):
            with complains(ValueError, "predictions[0]", "finite"):
                check(*outputs)
        doubled = (*CASES["objective"].arguments(8)[:2], tree_map(lambda t: 2 * t, outputs[2]))
        assert torch.isfinite(C2BINLoss().statistics(*doubled)).all()
        with complains(ValueError, "assignments[0][0]", "sum to 1"):
            C2BINLoss(validate_args=True).statistics(*doubled)
