"""What the kit draws, what it says, and how it is used."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.nn.functional import cosine_similarity
from zoo import (
    EMBEDDED,
    ONE,
    PAIR,
    align,
    gap,
    nce,
    table_of_broken,
    table_of_invariants,
    table_of_right,
)

import c2bin_ext
from c2bin_ext import BCAContrastiveLoss, ClusterEntropyRegularizer, functional, testing
from c2bin_ext.testing import (
    InvariantError,
    InvariantsError,
    LossRaisedError,
    _search,
    check_additive_over_shards,
    check_bounds,
    check_every_input_matters,
    check_finite,
    check_follows_formula,
    check_gradient,
    check_invariants,
    check_view_swap,
    invariants,
    parametrize_with_invariants,
    presets,
)
from c2bin_ext.testing._invariants import FORMULAS, REGISTRY, _same
from c2bin_ext.testing._search import name_of, show

ROOT = Path(c2bin_ext.__file__).parent.parent
KINDS: list[Any] = [ONE, PAIR, EMBEDDED]
NUMBER = r"-?\d[\d.e+-]*"
TENSOR = r"torch\.tensor\(.*\)"
one_direction = BCAContrastiveLoss(symmetric=False)


# --- values, in closed form -----------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_formulas(clusters: int) -> None:
    hard = torch.eye(clusters, dtype=torch.float64)
    contrast, balance, align = FORMULAS[PAIR], FORMULAS[ONE], FORMULAS[EMBEDDED]
    agreement = math.log1p((clusters - 1) * math.exp(-2))
    uniform, collapsed = torch.full_like(hard, 1 / clusters), hard[[0] * clusters]
    expected = {
        contrast(hard, hard): agreement,
        contrast(hard, hard.roll(1, 1)): math.log(clusters - 1 + math.exp(2)),
        contrast(uniform, uniform): math.log(clusters),
        contrast(collapsed, collapsed): (agreement + (clusters - 1) * math.log(clusters))
        / clusters,
        balance(hard): 0,
        balance(collapsed): math.log(clusters),
        balance(hard[[0, 0, 0, 1]]): math.log(clusters)
        + 0.75 * math.log(0.75)
        + math.log(0.25) / 4,
        align(hard, 3 * hard): 0,
        align(hard, hard.roll(1, 1)): 1,
        align(hard, -hard): 2,
    }
    for found, wanted in expected.items():
        assert found.item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("lower", "upper", "found"),
    [
        (0, 9, None),
        (1.0, 9, None),
        (1.01, 9, "1, outside of [1.01, 9]"),
        (0, lambda k: k - 1.01, ""),
    ],
)
def test_bounds(lower: Any, upper: Any, found: str | None) -> None:
    def check() -> None:
        check_bounds(lambda a, b: 1 + 0 * a.sum(), lower=lower, upper=upper, shapes=[(2, 2)])

    if found is None:
        check()
    else:
        with pytest.raises(InvariantError) as caught:
            check()
        assert found in caught.value.problem
    with pytest.raises(InvariantError):
        check_bounds(lambda a, b: a.sum() * math.nan, lower=-math.inf, upper=math.inf)
    check_bounds(lambda a, b: a.sum() * math.inf, lower=-math.inf, upper=math.inf)
    check_bounds(lambda a, b: 0 * a.sum() - 9e-6)
    with pytest.raises(InvariantError, match=r"-1.1e-05, outside of \[0, inf\]"):
        check_bounds(lambda a, b: 0 * a.sum() - 1.1e-5)


def test_bounds_of_one_view_are_functions_of_its_clusters() -> None:
    check_bounds(ClusterEntropyRegularizer(), ONE, upper=math.log)
    with pytest.raises(InvariantError, match=r"outside of \[0, "):
        check_bounds(ClusterEntropyRegularizer(), ONE, upper=lambda k: math.log(k) / 2)


def test_formulas_that_are_given() -> None:
    half = lambda a, b: nce(a, b) / 2  # noqa: E731
    plain = FORMULAS[PAIR]
    with pytest.raises(
        InvariantError, match=r"expected .* \(C2BIN's default; the option `formula` "
    ):
        check_follows_formula(half)
    check_follows_formula(half, formula=lambda a, b: plain(a, b) / 2)
    check_follows_formula(half, formula=lambda a, b: plain(a, b) / 2 + 0.01, atol=0.011)
    with pytest.raises(InvariantError) as caught:
        check_follows_formula(half, formula=lambda a, b: plain(a, b) / 2 + 0.01, atol=0.009)
    assert "C2BIN" not in str(caught.value)
    assert re.fullmatch(f"{NUMBER}, expected {NUMBER}", caught.value.problem)
    # What only holds at some inputs.
    chance = lambda a, b: math.log(a.shape[1]) / 2  # noqa: E731
    check_follows_formula(half, formula=chance, inputs=["uniform"])
    with pytest.raises(InvariantError):
        check_follows_formula(half, formula=chance)
    with pytest.raises(
        ValueError, match=r"^inputs: expected a sequence out of \('one_hot', .*uniforn"
    ):
        check_follows_formula(half, formula=chance, inputs=["uniform", "uniforn"])
    total = lambda a: len(a) * gap(a)  # noqa: E731
    check_follows_formula(total, ONE, formula=lambda a: len(a) * FORMULAS[ONE](a))


def test_tolerances_are_used() -> None:
    nearly = lambda a, b: 1 + 5e-4 * a[0, 0]  # noqa: E731
    with pytest.raises(InvariantError):
        check_view_swap(nearly)
    check_view_swap(nearly, atol=1e-3)
    check_view_swap(nearly, rtol=1e-3)
    with pytest.raises(InvariantError):
        check_view_swap(nearly, rtol=1e-5, atol=1e-5)


def test_infinite_values_are_equal() -> None:
    infinite = lambda *views: torch.tensor(math.inf)  # noqa: E731
    check_view_swap(infinite)
    with pytest.raises(InvariantError, match=r"^view_swap: nan, and swapped nan"):
        check_view_swap(lambda *views: torch.tensor(math.nan))


# --- gradients ------------------------------------------------------------------------------------


def test_gradients_that_are_missing_are_named() -> None:
    with pytest.raises(InvariantError, match=r"^gradient: no gradient reaches `assignments1`"):
        check_gradient(lambda a, b: nce(a, b.detach()))
    with pytest.raises(InvariantError, match=r"^gradient: no gradient reaches `prediction`"):
        check_gradient(lambda p, z: 1 - cosine_similarity(p.detach(), z).mean(), EMBEDDED)
    check_gradient(lambda a, b: nce(a, b.detach()), of=["assignments0"])
    with pytest.raises(InvariantError, match=r"^gradient: gradient of `assignments1` .* none\n"):
        check_gradient(nce, of=["assignments0"])
    with pytest.raises(InvariantError, match="no gradient reaches `target`"):
        check_gradient(align, EMBEDDED, of=["prediction", "target"])
    check_gradient(lambda p, z: align(p, z) + 1e-12 * z.sum(), EMBEDDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_losses_that_compute_in_one_dtype(dtype: torch.dtype) -> None:
    def right(p: Tensor, z: Tensor) -> Tensor:
        return 1 - cosine_similarity(p.to(dtype), z.to(dtype).detach()).mean()

    check_gradient(right, EMBEDDED, max_examples=100, derandomize=False)
    check_gradient(lambda a, b: 0.5 * nce(a.to(dtype), b.to(dtype)).double(), max_examples=100)
    for wrong in (0.5, 0.98, 1.02, 2.0, 0.0, -1.0):

        def loss(p: Tensor, z: Tensor, wrong: float = wrong) -> Tensor:
            value = right(p, z)
            return wrong * value + (1 - wrong) * value.detach()

        with pytest.raises(InvariantError):
            check_gradient(loss, EMBEDDED)


def test_kinks_are_no_wrong_gradient() -> None:
    """At a tie the gradient of a max is one of several; a wrong one is wrong beside it too."""
    check_gradient(lambda view: view.amax(), ONE)
    check_gradient(lambda p, z: (p - z.detach()).clamp_min(0).sum(), EMBEDDED)


def test_what_is_not_finite_is_named() -> None:
    with pytest.raises(InvariantError, match=r"^finite: value inf"):
        check_finite(lambda view: view.sum() / 0, ONE)
    with pytest.raises(InvariantError, match=r"^finite: gradient of `assignments1` "):
        check_finite(lambda first, second: (second - second).abs().sqrt().sum())
    check_finite(lambda first, second: second.float().sum())


# --- no false alarms by chance --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_without_ties_have_none(kind: Any) -> None:
    """Two rows in one direction would make entries of the other view cancel."""
    seen = []

    def loss(*views: Tensor) -> Tensor:
        seen.append(views[0])
        return torch.tensor(1.0 * len(seen), dtype=torch.float64)

    for shape in ((2, 2), (3, 2), (2, 3), (4, 4)):
        check_every_input_matters(loss, kind, shapes=[shape], max_examples=50)
    for view in seen:
        unit = torch.nn.functional.normalize(view)
        assert (unit @ unit.T - 2 * torch.eye(len(view))).max() < 1 - 1e-9
    entries = torch.cat([view.flatten() for view in seen])
    if kind == EMBEDDED:
        assert entries.abs().min() > 0
        assert entries.lt(0).double().mean().item() == pytest.approx(0.5, abs=0.1)
        assert entries.abs().max() < 5
    else:
        sums = torch.cat([view.sum(dim=1) for view in seen])
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert entries.min() > 0


def test_the_same_but_for_the_order_of_a_sum() -> None:
    assert _same(1e9 * (1 + 1e-13), 1e9)
    assert not _same(1e9 * (1 + 1e-11), 1e9)
    assert _same(0.0, 1e-13)
    assert not _same(0.0, 1e-11)


# --- exceptions, and results that are no scalar ---------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("result", "got"),
    [
        (1.0, "float"),
        (3, "int"),
        (None, "NoneType"),
        (torch.ones(7), r"torch.float32, torch.Size\(\[7\]\)"),
        (torch.tensor(3), r"torch.int64, torch.Size\(\[\]\)"),
        (torch.tensor(True), r"torch.bool, torch.Size\(\[\]\)"),
    ],
)
def test_results_that_are_no_scalar(kind: Any, result: Any, got: str) -> None:
    report = check_invariants(lambda *_: result, kind, raises=False, max_examples=2)
    assert list(report.failed) == list(invariants(kind))
    for name, error in report.failed.items():
        assert isinstance(error, LossRaisedError)
        assert error.problem.startswith("expected the loss to return a scalar tensor, got ")
        with pytest.raises(LossRaisedError, match=f"^{name}: .* got {got}\n"):
            raise error


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_raise(kind: Any) -> None:
    def loss(*views: Tensor) -> Tensor:
        if len(views[0]) > 1:
            raise KeyError("two\nrows")
        return views[0].sum()

    with pytest.raises(InvariantsError) as caught:
        check_invariants(loss, kind, max_examples=25)
    failed = caught.value.report.failed
    assert str(caught.value) == str(caught.value.report)
    assert "every_input_matters" in failed
    raised = [error for error in failed.values() if isinstance(error, LossRaisedError)]
    assert len(raised) > 5
    for error in raised:
        assert error.problem.startswith("the loss raised KeyError: ")
        assert isinstance(error.__cause__, KeyError)
        assert str(error).count("\n") == 3 + len(error.example)


def test_exceptions_in_the_backward_pass() -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return tensor.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise NotImplementedError("no backward")

    with pytest.raises(LossRaisedError, match="NotImplementedError: no backward"):
        check_finite(Raises.apply, ONE, max_examples=5)


def test_loss_that_differs_from_call_to_call() -> None:
    calls = iter(range(10**6))

    def loss(view: Tensor) -> Tensor:
        return torch.tensor(100.0 if next(calls) == 3 else 0.0)

    with pytest.raises(
        InvariantError, match=r"^bounds: a problem at one call and none at the next"
    ):
        check_bounds(loss, ONE, upper=1)


def test_losses_may_write_into_their_inputs() -> None:
    def loss(view0: Tensor, view1: Tensor) -> Tensor:
        value = nce(view0.clone(), view1.clone())
        view0.zero_()
        return value

    check_invariants(loss, only=["instance_permutation", "view_swap", "every_input_matters"])


# --- messages -------------------------------------------------------------------------------------


def test_message() -> None:
    with pytest.raises(AssertionError) as caught:
        check_view_swap(one_direction)
    lines = str(caught.value).split("\n")
    assert re.fullmatch(r"view_swap: [\d.]+, and swapped [\d.]+", lines[0])
    assert lines[1].startswith("  loss: BCAContrastiveLoss(")
    assert lines[2:4] == [
        "  should hold: L(view 0, view 1) = L(view 1, view 0)",
        "  smallest example:",
    ]
    assert [line.split(" = ")[0].strip() for line in lines[4:]] == ["assignments0", "assignments1"]
    assert len(lines[4]) < 80
    views = [eval(line.split(" = ")[1], {"torch": torch}) for line in lines[4:]]
    assert one_direction(*views) != one_direction(*views[::-1])
    error = caught.value
    assert isinstance(error, InvariantError)
    assert (error.invariant, error.formula) == ("view_swap", lines[2].split(": ")[1])
    for public in (InvariantError, InvariantsError, LossRaisedError):
        assert public.__module__ == "c2bin_ext.testing"


SCALING = "positive_scaling"


def rounded_by_autocast(view: Tensor) -> Tensor:
    view = view.float()
    return (view @ view.T).float().sum()


@pytest.mark.parametrize(
    ("name", "loss", "kind", "problem"),
    [
        (
            "instance_permutation",
            lambda view: view[0].square().sum(),
            ONE,
            "NUMBER, and with rows in another order NUMBER",
        ),
        (
            "cluster_relabelling",
            lambda view: view[:, 0].sum(),
            ONE,
            "NUMBER, and with columns in another order NUMBER",
        ),
        (
            "positive_scaling",
            lambda first, second: (first * second).sum(),
            PAIR,
            "NUMBER, and scaled NUMBER",
        ),
        (
            "every_input_matters",
            lambda first, second: first.square().sum(),
            PAIR,
            "row 0, column 0 of `assignments1` does not matter: L stays NUMBER",
        ),
        (
            "every_input_matters",
            lambda first, second: first.square().sum() + second.square().sum(),
            PAIR,
            "the views are not compared: L stays NUMBER",
        ),
        (
            "follows_formula",
            lambda view: view.square().sum(),
            ONE,
            r"NUMBER, expected NUMBER \(C2BIN's default; the option `formula` expects another\)",
        ),
        (
            "strictly_monotone",
            lambda view: -gap(view),
            ONE,
            "L is NUMBER, and with less agreement NUMBER, expected more",
        ),
        (
            "strictly_monotone",
            lambda first, second: nce(first, second).clamp_max(0.5),
            PAIR,
            "L is NUMBER, and with less agreement NUMBER, expected more",
        ),
        (
            "gradient",
            lambda prediction, target: (prediction * target).sum(),
            EMBEDDED,
            "gradient of `target` TENSOR, expected none",
        ),
        (
            "gradient",
            lambda view: view.square().sum() + view.square().sum().detach(),
            ONE,
            "gradient of `assignments`: NUMBER along a line, by finite differences NUMBER",
        ),
        (
            "gradient",
            lambda first, second: (first.detach() * second).sum(),
            PAIR,
            "no gradient reaches `assignments0`, and L changes with it",
        ),
        (
            "dtype",
            lambda view: view.float().sum().reshape(1),
            ONE,
            r"shape \(1,\), torch.float32, expected \(\), torch.float32",
        ),
        (
            "lower_precision",
            lambda view: (view * 3).square().sum(),
            ONE,
            "NUMBER, and in torch.float16 NUMBER",
        ),
        (
            "lower_precision",
            rounded_by_autocast,
            ONE,
            "NUMBER, and under autocast to bfloat16 NUMBER",
        ),
    ],
)
def test_a_message_is_a_sentence(name: str, loss: Any, kind: Any, problem: str) -> None:
    pattern = problem.replace("NUMBER", NUMBER).replace("TENSOR", TENSOR)
    report = check_invariants(loss, kind, only=[name], raises=False)
    assert re.fullmatch(pattern, report.failed[name].problem)


def test_infonce_holds_its_options() -> None:
    assert presets.infonce(similarity="dot", symmetric=False).skip == {"view_swap", SCALING}
    assert presets.infonce(symmetric=False).skip == {"view_swap"}
    assert presets.infonce(similarity="dot").skip == {SCALING}
    assert presets.infonce().skip == set()
    assert presets.infonce().options["bounds"] == {"lower": -math.inf, "upper": math.inf}
    assert "gradient" not in presets.infonce().options
    hard, scale = torch.eye(3, dtype=torch.float64), torch.tensor([[1.0], [2.0], [3.0]])
    for embeddings in (False, True):
        preset = presets.infonce(0.1, embeddings=embeddings)
        formula = preset.options["follows_formula"]["formula"]
        assert formula(hard, hard).item() == pytest.approx(math.log1p(2 * math.exp(-10)), rel=1e-9)
        # What is compared has no length: rows of embeddings, columns of assignments.
        rows, columns = scale * (hard + 1), (scale * (hard + 1)).T
        scaled, other = (rows, columns) if embeddings else (columns, rows)
        plain = formula(hard + 1, hard).item()
        assert formula(scaled, hard).item() == pytest.approx(plain, rel=1e-12)
        assert formula(other, hard).item() != pytest.approx(plain, rel=1e-3)
        trained = preset.options.get("gradient", {}).get("of")
        assert trained == (("prediction", "target") if embeddings else None)


def test_presets_name_what_there_is() -> None:
    infonce = presets.infonce(similarity="dot", symmetric=False, embeddings=True)
    for preset in (infonce, presets.own_values, presets.full_precision, presets.trains_both):
        assert preset.skip <= set(REGISTRY)
        assert preset.skip or preset.options
        assert preset.min_rows == 1
        for name, options in preset.options.items():
            assert set(options) <= set(REGISTRY[name].options)


def test_a_preset_has_bounds() -> None:
    preset = presets.follows(FORMULAS[ONE], 0, 1e-9)
    report = check_invariants(gap, ONE, preset=preset, only=["bounds", "dtype"], raises=False)
    assert list(report.failed) == ["bounds"]


def test_the_formula_of_tiny_columns_and_on_any_device() -> None:
    views = torch.rand(2, 4, 3, dtype=torch.float64)
    tiny = presets.contrast(*(1e-140 * views))
    torch.testing.assert_close(tiny, presets.contrast(*views), rtol=1e-12, atol=0)
    assert presets.contrast(*views.to("meta"), positive_in_denominator=False).is_meta


@pytest.mark.parametrize(
    ("name", "loss", "kind", "drawn"),
    [
        ("instance_permutation", lambda view: view[0].square().sum(), ONE, ["permutation"]),
        ("cluster_relabelling", lambda view: view[:, 0].sum(), ONE, ["permutation"]),
        (SCALING, align, PAIR, ["assignments0_scale", "assignments1_scale"]),
        ("strictly_monotone", lambda view: -gap(view), ONE, ["clusters", "nearer", "farther"]),
    ],
)
def test_an_example_names_what_was_drawn(name: str, loss: Any, kind: Any, drawn: list[str]) -> None:
    inputs = {ONE: ["assignments"], PAIR: ["assignments0", "assignments1"]}[kind]
    report = check_invariants(loss, kind, only=[name], raises=False)
    assert list(report.failed[name].example) == [*inputs, *drawn]


@pytest.mark.parametrize(
    ("kind", "drawn"), [(PAIR, "rows_of_each_cluster_moved"), (EMBEDDED, "angles")]
)
def test_an_example_names_the_views_that_were_built(kind: Any, drawn: str) -> None:
    constant = lambda a, b: 0 * (a + b).sum()  # noqa: E731
    report = check_invariants(constant, kind, only=["strictly_monotone"], raises=False)
    example = report.failed["strictly_monotone"].example
    assert list(example) == [drawn, "nearer", "farther", "first"]


def test_report() -> None:
    report = check_invariants(one_direction, only=["view_swap", "dtype"], raises=False)
    assert (report.passed, list(report.failed)) == (("dtype",), ["view_swap"])
    assert len(report.skipped) == len(invariants(PAIR)) - 2
    lines = str(report).split("\n")
    assert lines[0].startswith("BCAContrastiveLoss(")
    assert lines[0].endswith(": 1 of 2 hold")
    assert re.fullmatch(r"  view_swap: [\d.]+, and swapped [\d.]+", lines[1])
    assert lines[-2] == "  hold: dtype"
    # All that were skipped are in one line.
    assert lines[-1] == f"  skipped: {', '.join(report.skipped)}"
    assert len(lines) == 8
    # What there is none of has no line.
    whole = testing.Report("mine", ("dtype",), {}, ())
    assert str(whole) == "mine: 1 of 1 hold\n  hold: dtype"


def test_examples_repeat_whatever_is_imported() -> None:
    def messages() -> list[str]:
        only = ["view_swap", "positive_scaling", "every_input_matters", "follows_formula"]
        loss = lambda a, b: a.norm() + b.max()  # noqa: E731
        report = check_invariants(loss, only=only, raises=False, max_examples=15)
        return [str(error) for error in report.failed.values()]

    first = messages()
    assert first
    module = type(sys)("a_module_of_mine")
    module.__file__ = str(ROOT / "examples" / "check_a_loss.py")
    sys.modules["a_module_of_mine"] = module
    try:
        assert messages() == first
    finally:
        del sys.modules["a_module_of_mine"]
    assert check_invariants(nce, only=["gradient"], derandomize=False).passed


def test_names() -> None:
    class Long(torch.nn.Module):
        def extra_repr(self) -> str:
            return "x" * 200

    class Called:
        def __call__(self) -> None: ...

        def __repr__(self) -> str:
            return "Called(\n  1)"

    assert name_of(Long()) == "Long(...)"
    assert name_of(Called()) == "Called( 1)"
    assert name_of(max) == "max"
    assert name_of(lambda: None).startswith("the lambda in test_kit.py, line ")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.tensor([[1 / 3, 2 / 3], [0.0, 1.0]]), "torch.tensor([[1/3, 2/3], [0, 1]])"),
        (torch.tensor(0.1), "torch.tensor(1/10)"),
        (torch.tensor([1e6, 2e6 + 1.0]), "torch.tensor([1000000, 2000001])"),
        (torch.tensor([999999.0, -0.0]), "torch.tensor([999999, 0])"),
        (torch.tensor([1 / 64, 1 / 65]), "torch.tensor([1/64, 0.0153846154])"),
        (torch.tensor(1 / 3, dtype=torch.float64), "torch.tensor(1/3, dtype=torch.float64)"),
        (
            torch.tensor([0.1234567890123, 1e-8], dtype=torch.float64),
            "torch.tensor([0.1234567890123, 1e-08], dtype=torch.float64)",
        ),
        (torch.tensor([[-math.inf]]), "torch.tensor([[float('-inf')]])"),
        (torch.tensor([math.nan]).half(), "torch.tensor([float('nan')], dtype=torch.float16)"),
        (torch.arange(3), "torch.tensor([0, 1, 2], dtype=torch.int64)"),
        ("word", "'word'"),
    ],
)
def test_show(value: Any, text: str) -> None:
    assert show(value) == text
    if isinstance(value, Tensor) and value.isfinite().all():
        again = eval(text, {"torch": torch})
        assert torch.allclose(again.double(), value.double(), rtol=1e-7)


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind: Any) -> None:
    seen: set[tuple[int, ...]] = set()

    def loss(*views: Tensor) -> Tensor:
        seen.add(tuple(views[0].shape))
        return views[0].sum()

    check_invariants(loss, kind, shapes=[(4, 2), (6, 3)], max_examples=15, raises=False)
    assert seen == {(4, 2), (6, 3)}
    # Of one instance, nothing is to be seen of what is contrasted.
    check_every_input_matters(lambda *views: torch.zeros(()), kind, shapes=[(1, 4)])
    with pytest.raises(InvariantError):
        check_every_input_matters(lambda *views: torch.zeros(()), kind, shapes=[(2, 2)])


def test_device_and_number_of_examples() -> None:
    seen = []

    def loss(view0: Tensor, view1: Tensor) -> Tensor:
        seen.append((view0.device.type, view1.device.type))
        return torch.zeros(())

    check_invariants(loss, device="meta", only=["finite"], max_examples=1)
    assert seen == [("meta", "meta")] * 4


def test_compiled() -> None:
    loss = torch.compile(BCAContrastiveLoss(), backend="eager", fullgraph=True)
    for name in invariants(PAIR):
        # Each dtype, and each set of tensors with a gradient, is compiled anew: 8 times at most.
        torch.compiler.reset()
        check_invariants(loss, only=[name], shapes=[(4, 2)], max_examples=3)
    torch.compiler.reset()
    broken = torch.compile(one_direction, backend="eager", fullgraph=True)
    with pytest.raises(InvariantError):
        check_view_swap(broken, shapes=[(2, 2)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "assignments"}, "kind: expected one of"),
        ({"skip": ["view_swaps"]}, r"skip: .* got \['view_swaps'\]"),
        ({"skip": "view_swap"}, "skip: .* got 'view_swap'"),
        ({"kind": ONE, "only": ["view_swap"]}, r"only: .* got \['view_swap'\]"),
        ({"options": {"limits": {}}}, r"options: .* got \['limits'\]"),
        ({"options": {"bounds": {"top": 1}}}, r"options: bounds expected .* got \['top'\]"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_invariants(nce, **arguments)


def test_one_invariant() -> None:
    for name in REGISTRY:
        assert callable(getattr(testing, f"check_{name}"))
    with pytest.raises(
        AttributeError, match=r"^module 'c2bin_ext.testing' has no attribute 'check_nothing'$"
    ):
        testing.check_nothing  # noqa: B018
    with pytest.raises(ValueError, match="kind: cluster_relabelling expected one of"):
        testing.check_cluster_relabelling(nce, kind=EMBEDDED)


# --- under pytest ---------------------------------------------------------------------------------


@parametrize_with_invariants(ClusterEntropyRegularizer(), ONE, max_examples=5, skip=["dtype"])
def test_under_pytest(loss: Any, check: Callable[..., None]) -> None:
    check(loss)


def test_parametrized_tests_in_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        """
from c2bin_ext.testing import check_invariants, parametrize_with_invariants

def mine(assignments):
    return assignments.sum() * 0 - 1

@parametrize_with_invariants(mine, "assignment", max_examples=5, only=["bounds", "dtype", "finite",
    "every_input_matters"])
def test_mine(check):
    check()

@parametrize_with_invariants(mine, "assignment", only=["bounds"])
def test_by_name(loss, invariant):
    check_invariants(loss, "assignment", only=[invariant])
"""
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "test_mine.py"]
    # On CI servers pytest prints messages whole.
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "BUILD_NUMBER")}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    run: Any = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "4 failed, 1 passed" in run.stdout, run.stdout
    summary = [line for line in run.stdout.split("\n") if line.startswith("FAILED")]
    assert summary[0].startswith(
        "FAILED test_mine.py::test_mine[every_input_matters] - c2bin_ext.testing.InvariantError: "
        "every_input_matters: row 0, column 0 of `assignments` does not matter: L stays -1"
    )
    assert "_suite.py" not in run.stdout
    assert "_search.py" not in run.stdout
    assert run.stdout.count("skipped") == 1


def test_a_test_takes_what_it_names() -> None:
    def one(check: Any) -> None: ...

    def two(invariant: str, loss: Any) -> None: ...

    for test, names in ((one, ["check"]), (two, ["loss", "invariant"])):
        only = {"only": ["bounds", "dtype"]}
        (mark,) = parametrize_with_invariants(nce, **only)(test).pytestmark
        taken, rows = mark.args
        assert (taken, mark.kwargs) == (names, {"ids": ["bounds", "dtype"]})
        assert len(rows) == 2
    assert rows == [(nce, "bounds"), (nce, "dtype")]


def test_parametrize_refuses() -> None:
    with pytest.raises(
        TypeError, match=r"^test_nothing: expected the parameter `check`, got \[\]$"
    ):

        @parametrize_with_invariants(gap, ONE)
        def test_nothing() -> None: ...

    with pytest.raises(ValueError, match=r"^skip: expected names"):
        parametrize_with_invariants(gap, ONE, skip=["view_swap"])


def test_inside_another_property() -> None:
    @settings(database=None, max_examples=2, suppress_health_check=[HealthCheck.nested_given])
    @given(testing.assignments(rows=2, clusters=2))
    def outer(view: Tensor) -> None:
        check_view_swap(nce, max_examples=3)

    outer()


# --- sums over shards -----------------------------------------------------------------------------


def test_sums_over_shards() -> None:
    def several(a: Tensor, b: Tensor) -> Any:
        return a.T @ b, b.sum()

    def one_is_a_mean(a: Tensor, b: Tensor) -> Any:
        return [a.sum(), b.mean() * b.shape[1]]

    check_additive_over_shards(functional.cluster_mass)
    several_tensors: Callable[[Callable[..., tuple[Tensor, ...]]], None]
    several_tensors = check_additive_over_shards  # mypy: it takes what returns several
    several_tensors(lambda view: (view.sum(), view.sum(dim=0)))
    check_additive_over_shards(several, PAIR)
    message = f"^additive_over_shards: from sums over shards {TENSOR}, whole {TENSOR}\n"
    with pytest.raises(InvariantError, match=message) as caught:
        check_additive_over_shards(lambda view: view.mean(dim=0))
    assert caught.value.example["assignments"].shape == (2, 2)
    assert caught.value.example["shards"] == (1, 1)
    with pytest.raises(InvariantError, match=r"from sums over shards .*2.*, whole .*1"):
        check_additive_over_shards(one_is_a_mean, PAIR)
    nearly = lambda view: view.sum() + 1e-3  # noqa: E731
    with pytest.raises(InvariantError):
        check_additive_over_shards(nearly)
    check_additive_over_shards(nearly, atol=1e-2)
    check_additive_over_shards(nearly, rtol=1e-2)
    with pytest.raises(LossRaisedError, match="KeyError"):
        check_additive_over_shards({}.__getitem__)


# --- the page, the package ------------------------------------------------------------------------


def test_the_page() -> None:
    page = (ROOT / "docs" / "reference" / "testing.md").read_text(encoding="utf-8")
    for part in (table_of_invariants(), table_of_broken(), table_of_right()):
        assert part in page
    blocks = [block.split("```")[0] for block in page.split("```python\n")]
    namespace: dict[str, Any] = {}
    exec(next(block for block in blocks if "def check_least_at_balance" in block), namespace)
    check = namespace["check_least_at_balance"]
    check(ClusterEntropyRegularizer(), max_examples=15)
    with pytest.raises(
        InvariantError, match=r"^least_at_balance: .*\n  loss: the lambda in test_ki"
    ):
        check(lambda view: -gap(view))
    with pytest.raises(LossRaisedError, match=r"^least_at_balance: the loss raised "):
        check(torch.linalg.inv)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    program = """
import c2bin_ext.testing as testing
from c2bin_ext import ClusterEntropyRegularizer
testing.check_invariants(ClusterEntropyRegularizer(), "assignment", max_examples=3)
"""
    environment = {k: v for k, v in os.environ.items() if k != "HYPOTHESIS_STORAGE_DIRECTORY"}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert list(tmp_path.iterdir()) == []


def test_import() -> None:
    program = """
import sys
import c2bin_ext
assert "hypothesis" not in sys.modules and "c2bin_ext.testing" not in sys.modules
sys.modules["pytest"] = None
import c2bin_ext.testing
del sys.modules["c2bin_ext.testing"]
sys.modules["hypothesis"] = None
try:
    import c2bin_ext.testing
except ImportError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert 'pip install "c2bin-ext[testing]"' in done.stdout


def test_all_and_docstrings() -> None:
    assert len(set(testing.__all__)) == len(testing.__all__)
    for name in testing.__all__:
        item = getattr(testing, name)
        if not inspect.isfunction(item):
            continue
        text = inspect.getdoc(item) or ""
        for part in ("Args:", "Returns:", "Raises:", ">>> ", "Source: "):
            assert part in text, (name, part)
        for parameter in inspect.signature(item).parameters:
            assert parameter in text, (name, parameter)
    for kind in KINDS:
        assert set(invariants(kind)) <= set(REGISTRY)
    assert _search.InvariantError is InvariantError
