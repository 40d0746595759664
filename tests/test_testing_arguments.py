"""Every check of the kit uses what it is given: tolerances, examples, shapes, device, and words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from c2bin_ext import BCAContrastiveLoss, functional, testing
from c2bin_ext.testing import (
    InvariantError,
    InvariantsError,
    LossRaisedError,
    _invariants,
    check_additive_over_shards,
    check_invariants,
)
from c2bin_ext.testing._search import name_of, show

DRAW = settings(
    database=None,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
FIND = settings(DRAW, phases=[Phase.generate, Phase.shrink], max_examples=400)
Loss = Callable[..., Tensor]
PAIR, ONE, EMBEDDED = "assignment_pair", "assignment", "embedding_pair"

# What a message says should hold, and the kinds of loss the check is for.
CHECKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "instance_permutation": ("L(rows in any order) = L(rows)", (ONE, PAIR, EMBEDDED)),
    "cluster_relabelling": ("L(columns in any order) = L(columns)", (ONE, PAIR)),
    "view_swap": ("L(view 0, view 1) = L(view 1, view 0)", (PAIR, EMBEDDED)),
    "positive_scaling": ("L(α p, β z) = L(p, z) for α, β > 0", (EMBEDDED,)),
    "column_scale": ("L(α_k c'_k, β_k c''_k) = L(c'_k, c''_k) for α, β > 0", (PAIR,)),
    "bounds": ("lower <= L <= upper", (ONE, PAIR, EMBEDDED)),
    "value_at_agreement": ("L(y, y) = value", (PAIR, EMBEDDED)),
    "value_at_balance": ("L(balanced one-hot) = value", (ONE,)),
    "value_at_collapse": ("L(all in one cluster) = value", (ONE, PAIR)),
    "value_at_uniform": ("L(1/K everywhere) = value", (ONE, PAIR)),
    "monotone_entropy": ("L does not rise when mass moves to a lighter cluster", (ONE,)),
    "finite": ("value and gradient are finite", (ONE, PAIR, EMBEDDED)),
    "gradient": ("autograd = finite differences", (ONE, PAIR, EMBEDDED)),
    "no_gradient_to_target": ("dL/d target = 0", (EMBEDDED,)),
    "dtype": ("0-dim, float32 at least, float64 stays", (ONE, PAIR, EMBEDDED)),
    "lower_precision": ("L in lower precision = L in float32", (ONE, PAIR, EMBEDDED)),
    "additive_over_shards": ("T(whole) = Σ_r T(shard r)", (ONE, PAIR, EMBEDDED)),
}
CASES = [(name, kind) for name, (_, kinds) in CHECKS.items() for kind in kinds]
IDS = [f"{name}-{kind}" for name, kind in CASES]


class Search(NamedTuple):
    """What a check asked of the search."""

    name: str
    formula: str
    loss: Any
    examples: st.SearchStrategy[dict[str, Any]]
    problem: Callable[[dict[str, Any]], str | None]
    max_examples: int
    derandomize: bool


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Search]:
    """Keep every search in place of making it."""
    made: list[Search] = []

    def search(
        name: str,
        formula: str,
        loss: Any,
        examples: Any,
        problem: Any,
        *,
        max_examples: int,
        derandomize: bool,
    ) -> None:
        made.append(Search(name, formula, loss, examples, problem, max_examples, derandomize))

    monkeypatch.setattr(_invariants, "search", search)
    return made


def call(name: str, kind: str, loss: Loss, **arguments: Any) -> None:
    """Call a check, with the kind where it takes one."""
    if len(CHECKS[name][1]) > 1:
        arguments["kind"] = kind
    getattr(testing, f"check_{name}")(loss, **arguments)


def tensors(example: dict[str, Any]) -> list[Tensor]:
    """Return the inputs of the loss in an example."""
    return [value for value in example.values() if isinstance(value, Tensor)]


def drawn(search: Search, count: int = 100) -> list[dict[str, Any]]:
    """Return examples that a search would try, always the same ones."""
    found: list[dict[str, Any]] = []

    @settings(DRAW, max_examples=count)
    @given(search.examples)
    def keep(example: dict[str, Any]) -> None:
        found.append(example)

    keep()
    return found


def sound(*views: Tensor) -> Tensor:
    """Return a loss that is not looked at."""
    return views[0].sum()


# --- what a check asks of the search --------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES, ids=IDS)
def test_defaults(name: str, kind: str, searches: list[Search]) -> None:
    call(name, kind, sound)
    # n, and K or d: from the least that is allowed to more than two.
    least, most = (1, 1 if kind == EMBEDDED else 2), (6, 5)
    if name == "value_at_balance" or (name == "value_at_agreement" and kind == PAIR):
        least, most = (2, 2), (12, 4)
    if name == "gradient" and kind != EMBEDDED:
        most = (4, 4)
    for made in searches:
        assert (made.name, made.formula, made.loss) == (name, CHECKS[name][0], sound)
        assert (made.max_examples, made.derandomize) == (50, True)
        examples = drawn(made)
        assert {x.device.type for e in examples for x in tensors(e)} == {"cpu"}
        for axis in (0, 1):
            sizes = {tensors(e)[0].shape[axis] for e in examples}
            assert (min(sizes), max(sizes)) == (least[axis], most[axis])


@pytest.mark.parametrize(("name", "kind"), CASES, ids=IDS)
def test_arguments(name: str, kind: str, searches: list[Search]) -> None:
    call(name, kind, sound, max_examples=7, derandomize=False, shapes=[(8, 4)], device="meta")
    for made in searches:
        assert (made.max_examples, made.derandomize) == (7, False)
        for example in drawn(made, 5):
            assert {(x.device.type, tuple(x.shape)) for x in tensors(example)} == {("meta", (8, 4))}
            assert len(tensors(example)) == (1 if kind == ONE else 2)


@pytest.mark.parametrize("name", ["finite", "dtype", "lower_precision"])
@pytest.mark.parametrize("kind", [ONE, PAIR, EMBEDDED])
def test_dtypes(name: str, kind: str, searches: list[Search]) -> None:
    def seen() -> list[torch.dtype]:
        found = [{x.dtype for e in drawn(made, 3) for x in tensors(e)} for made in searches]
        searches.clear()
        assert all(len(dtypes) == 1 for dtypes in found)
        return [dtype for dtypes in found for dtype in dtypes]

    halves = [torch.float16, torch.bfloat16]
    # The last one is for autocast.
    usual = [*halves, torch.float32]
    everything = [torch.float32, torch.float64, *halves]
    call(name, kind, sound)
    assert seen() == (usual if name == "lower_precision" else everything)
    call(name, kind, sound, dtypes=[torch.bfloat16])
    autocast = [torch.float32] if name == "lower_precision" else []
    assert seen() == [torch.bfloat16, *autocast]
    if name == "lower_precision":
        call(name, kind, sound, dtypes=halves, autocast=False)
        assert seen() == halves


def nearly_hard(example: dict[str, Any]) -> bool:
    """Say whether an assignment is next to 0, which small integers over their sum never are."""
    return any(((x > 0) & (x < 1e-4)).any() for x in tensors(example))


def constant(example: dict[str, Any]) -> bool:
    """Say whether all rows are alike, and columns are not."""
    x = tensors(example)[0].float()
    return len(x) > 1 and x.shape[1] > 1 and bool((x == x[0]).all() and (x[0] != x[0, 0]).any())


def has_zero_row(example: dict[str, Any]) -> bool:
    """Say whether an embedding has a row of zeros and one of others."""
    return any(0 < (x == 0).all(1).sum() < len(x) for x in tensors(example))


def extreme(example: dict[str, Any]) -> bool:
    """Say whether an embedding is huge or tiny."""
    sizes = torch.stack([x.double().abs().max() for x in tensors(example)])
    return bool((sizes >= 4000).any() or ((sizes > 0) & (sizes < 1e-3)).any())


@pytest.mark.parametrize("name", ["column_scale", "dtype", "additive_over_shards"])
def test_ordinary_assignments(name: str, searches: list[Search]) -> None:
    call(name, PAIR, sound)
    for made in searches:
        examples = drawn(made)
        assert not any(map(nearly_hard, examples))
        assert any(map(constant, examples))


@pytest.mark.parametrize("name", ["instance_permutation", "view_swap", "bounds", "finite"])
def test_extreme_inputs(name: str, searches: list[Search]) -> None:
    call(name, PAIR, sound)
    halfway = len(searches)
    call(name, EMBEDDED, sound)
    for made in searches[:halfway]:
        assert any(map(nearly_hard, drawn(made)))
    for made in searches[halfway:]:
        examples = drawn(made)
        assert any(map(has_zero_row, examples))
        assert any(map(extreme, examples))


@pytest.mark.parametrize(
    "name",
    [
        "positive_scaling",
        "value_at_agreement",
        "gradient",
        "no_gradient_to_target",
        "dtype",
        "lower_precision",
        "additive_over_shards",
    ],
)
def test_ordinary_embeddings(name: str, searches: list[Search]) -> None:
    call(name, EMBEDDED, sound)
    for made in searches:
        examples = drawn(made)
        assert any(map(has_zero_row, examples)) == (name == "additive_over_shards")
        assert not any(map(extreme, examples))
        assert any(map(constant, examples))


def test_softmax_in_lower_precision(searches: list[Search]) -> None:
    call("lower_precision", PAIR, sound)
    for made in searches:
        assert any(map(constant, drawn(made)))
        # No small integers over their sum.
        assert any(((x > 0) & (x < 1e-3)).any() for e in drawn(made) for x in tensors(e))


@pytest.mark.parametrize("kind", [ONE, PAIR])
@pytest.mark.parametrize("name", ["value_at_collapse", "value_at_uniform"])
def test_rows_of_the_values(name: str, kind: str, searches: list[Search]) -> None:
    call(name, kind, sound, rows=3)
    shapes = {tuple(x.shape) for e in drawn(searches[0]) for x in tensors(e)}
    assert shapes == {(3, clusters) for clusters in range(2, 6)}
    for x in (x for e in drawn(searches[0]) for x in tensors(e)):
        if name == "value_at_uniform":
            assert (x == 1 / x.shape[1]).all()
        else:
            assert x.sum(0).max() == 3
    assert len({x.argmax().item() for e in drawn(searches[0]) for x in tensors(e)}) == (
        1 if name == "value_at_uniform" else 5
    )


def test_rows_per_cluster(searches: list[Search]) -> None:
    testing.check_value_at_balance(sound)
    testing.check_value_at_agreement(sound)
    for made in searches:
        hard = [tensors(e)[0] for e in drawn(made)]
        assert {tuple(x.sum(0).unique().tolist()) for x in hard} == {(1.0,), (2.0,), (3.0,)}
        assert {x.shape[1] for x in hard} == {2, 3, 4}
        # In any order.
        assert any((x.argmax(1).diff() < 0).any() for x in hard)
    searches.clear()
    testing.check_value_at_balance(sound, rows_per_cluster=2)
    testing.check_value_at_agreement(sound, rows_per_cluster=2)
    testing.check_value_at_balance(sound, shapes=[(6, 3)])
    for made in searches:
        assert all((tensors(e)[0].sum(0) == 2).all() for e in drawn(made, 20))
    for bad in ({"rows_per_cluster": 0}, {"shapes": [(4, 3)]}):
        searches.clear()
        testing.check_value_at_balance(sound, **bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^rows_per_cluster: expected|^shapes: expected n a"):
            drawn(searches[0])


def test_what_is_drawn_beside_the_inputs(searches: list[Search]) -> None:
    call("instance_permutation", PAIR, sound)
    call("cluster_relabelling", PAIR, sound)
    for made, axis in zip(searches, (0, 1), strict=True):
        orders = [(tensors(e)[0].shape[axis], tuple(e["permutation"])) for e in drawn(made)]
        assert all(sorted(order) == list(range(size)) for size, order in orders)
        assert len({order for size, order in orders if size == 3}) > 2

    searches.clear()
    call("positive_scaling", EMBEDDED, sound)
    call("column_scale", PAIR, sound)
    pairs = (("prediction", "target"), ("assignments0", "assignments1"))
    for made, axis, names in zip(searches, (0, 1), pairs, strict=True):
        for name in names:
            drawn_factors = [(tensors(e)[0].shape[axis], e[f"{name}_scale"]) for e in drawn(made)]
            assert all(size == len(factors) for size, factors in drawn_factors)
            places = {
                (place, factor)
                for _, factors in drawn_factors
                for place, factor in enumerate(factors)
                if factor != 1
            }
            assert {factor for _, factor in places} == {2.0, 0.5, 100.0, 0.01}
            assert {place for place, _ in places} >= {0, 1, 2, 3}
            assert all(sum(f != 1 for f in factors) <= 1 for _, factors in drawn_factors)

    searches.clear()
    call("monotone_entropy", ONE, sound)
    examples = drawn(searches[0])
    assert {e["part_of_gap"] for e in examples} == {0.25, 0.5, 1.0}
    assert all(len(e["clusters"]) == 2 and len(set(e["clusters"])) == 2 for e in examples)
    assert {e["clusters"] for e in examples if tensors(e)[0].shape[1] == 2} == {(0, 1), (1, 0)}

    searches.clear()
    call("additive_over_shards", PAIR, sound)
    assert all(sum(e["shards"]) == len(tensors(e)[0]) for e in drawn(searches[0]))
    assert {len(e["shards"]) for e in drawn(searches[0])} == {1, 2, 3, 4}


def test_aligned_embeddings_differ_in_length(searches: list[Search]) -> None:
    call("value_at_agreement", EMBEDDED, sound)
    ratios = [e["prediction"].abs().max() / e["target"].abs().max() for e in drawn(searches[0])]
    assert {round(ratio.item(), 6) for ratio in ratios} == {1.0, 2.0, 0.5, 100.0, 0.01}
    for e in drawn(searches[0]):
        cosines = torch.cosine_similarity(e["prediction"], e["target"])
        assert torch.allclose(cosines, torch.ones_like(cosines))


def test_logits(searches: list[Search]) -> None:
    call("gradient", PAIR, sound)
    names = ["logits of assignments0", "logits of assignments1"]
    examples = drawn(searches[0])
    assert all(list(e) == names for e in examples)
    values = {value for e in examples for value in e[names[1]].flatten().tolist()}
    assert values == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert {x.dtype for e in examples for x in e.values()} == {torch.float64}


# --- tolerances, and what is said to be wrong -----------------------------------------------------


class Off(NamedTuple):
    """A loss of about 1 that is off by `size` at most, where a check looks."""

    kind: str
    loss: Callable[[float], Loss]
    found: str
    arguments: dict[str, Any]


NUMBER = r"-?[\d.]+(e-\d+)?"
AT_ONE = {"value": 1.0}


def corner(size: float) -> Loss:
    """Return a loss that singles out one entry of view 0."""
    return lambda *views: 1 + size * views[0][0, 0].tanh()


def plus(size: float) -> Loss:
    """Return a loss that is too high."""
    return lambda *views: (1 + size) + 0 * views[0].sum()


def rises(size: float) -> Loss:
    """Return a loss that is highest where masses are equal."""
    return lambda view: 1 - size * functional.cluster_entropy_regularizer(view)


def steeper(size: float) -> Loss:
    """Return a loss whose gradient is too large."""

    def loss(*views: Tensor) -> Tensor:
        value = views[0].square().sum()
        return 1 + (1 + size) * value - size * value.detach()

    return loss


def coarser(size: float) -> Loss:
    """Return a loss that is higher in lower precision, and under autocast."""

    def loss(view0: Tensor, view1: Tensor) -> Tensor:
        low = view0.element_size() < 4 or torch.is_autocast_enabled("cpu")
        return torch.ones(()) * (1 + size * low)

    return loss


OFF: dict[str, Off] = {
    "instance_permutation": Off(PAIR, corner, f"{NUMBER}, and after the permutation {NUMBER}", {}),
    "cluster_relabelling": Off(PAIR, corner, f"{NUMBER}, and after the relabelling {NUMBER}", {}),
    "view_swap": Off(PAIR, corner, f"{NUMBER}, and swapped {NUMBER}", {}),
    "positive_scaling": Off(EMBEDDED, corner, f"{NUMBER}, and scaled {NUMBER}", {}),
    "column_scale": Off(PAIR, corner, f"{NUMBER}, and scaled {NUMBER}", {}),
    "bounds": Off(
        PAIR, plus, rf"{NUMBER}, outside of \[0.5, 1\]", {"lower": 0.5, "upper": lambda k: k / k}
    ),
    "value_at_agreement": Off(PAIR, plus, f"{NUMBER}, expected 1", AT_ONE),
    "value_at_balance": Off(ONE, plus, f"{NUMBER}, expected 1", {"value": lambda k: k / k}),
    "value_at_collapse": Off(PAIR, plus, f"{NUMBER}, expected 1", AT_ONE),
    "value_at_uniform": Off(PAIR, plus, f"{NUMBER}, expected 1", {"value": lambda k: k / k}),
    "monotone_entropy": Off(
        ONE,
        rises,
        rf"moving mass {NUMBER} from column \d to column \d raised it from {NUMBER} to {NUMBER}",
        {},
    ),
    "gradient": Off(PAIR, steeper, "Jacobian mismatch for output 0 with respect to input 0.*", {}),
    "lower_precision": Off(PAIR, coarser, f"1, and in torch.b?float16 {NUMBER}", {}),
}


def test_every_tolerance_is_tried() -> None:
    with_tolerance = {
        name
        for name in CHECKS
        if {"rtol", "atol"} <= set(getattr(testing, f"check_{name}").__annotations__)
    }
    assert with_tolerance == {*OFF, "additive_over_shards"}


@pytest.mark.parametrize("name", OFF)
def test_tolerances(name: str) -> None:
    off = OFF[name]
    size = 5e-3 if name == "gradient" else 5e-4
    with pytest.raises(InvariantError) as caught:
        call(name, off.kind, off.loss(size), **off.arguments)
    assert re.fullmatch(off.found, caught.value.problem), caught.value.problem
    # A tenth of what is allowed, and each tolerance alone.
    scale = 1e-2 if name in ("gradient", "lower_precision") else 1e-1
    call(name, off.kind, off.loss(1e-5 * scale), **off.arguments)
    for tolerance in ({"rtol": 0.1, "atol": 0.0}, {"rtol": 0.0, "atol": 0.1}):
        if name == "gradient" and not tolerance["atol"]:
            tolerance["atol"] = 1e-9  # for gradients that are 0
        call(name, off.kind, off.loss(size), **off.arguments, **tolerance)
    with pytest.raises(InvariantError):
        call(name, off.kind, off.loss(size), **off.arguments, rtol=1e-5, atol=1e-5)


def test_lower_bound() -> None:
    limits = {"lower": lambda k: 1.0 * k, "upper": 9.0}
    with pytest.raises(InvariantError, match=r"found: 1.0005, outside of \[2, 9\]"):
        testing.check_bounds(plus(5e-4), **limits)
    testing.check_bounds(plus(-5e-4), lower=1.0, upper=9.0, atol=0.1)
    testing.check_bounds(plus(-5e-4), lower=1.0, upper=9.0, atol=0.0, rtol=0.1)
    with pytest.raises(InvariantError):
        testing.check_bounds(plus(-5e-4), lower=1.0, upper=9.0)
    for value in (-math.inf, math.inf, math.nan):
        with pytest.raises(InvariantError):
            testing.check_bounds(lambda *_, value=value: torch.tensor(value))
    testing.check_bounds(lambda *_: torch.tensor(5.0), lower=-math.inf, upper=math.inf)


@pytest.mark.parametrize(
    ("kind", "lower", "upper"),
    [
        (ONE, lambda k: 0.0, math.log),
        (
            PAIR,
            lambda k: math.log(1 + (k - 1) / math.e**2),
            lambda k: math.log(1 + (k - 1) * math.e**2),
        ),
        (EMBEDDED, lambda k: 0.0, lambda k: 2.0),
    ],
)
def test_default_bounds(
    kind: str, lower: Callable[[int], float], upper: Callable[[int], float]
) -> None:
    def at(bound: Callable[[int], float], more: float = 0.0) -> Loss:
        return lambda *views: torch.tensor(bound(views[0].shape[1]) + more, dtype=torch.float64)

    for bound, outside in ((lower, -1e-3), (upper, 1e-3)):
        call("bounds", kind, at(bound))
        call("bounds", kind, at(bound, -outside))
        with pytest.raises(InvariantError):
            call("bounds", kind, at(bound, outside))


def test_infinite_values_are_equal() -> None:
    def infinite(*views: Tensor) -> Tensor:
        return torch.tensor(math.inf)

    testing.check_view_swap(infinite)
    testing.check_value_at_uniform(infinite, value=math.inf)
    with pytest.raises(InvariantError, match="found: inf, expected 2"):
        testing.check_value_at_uniform(infinite, value=2)
    with pytest.raises(InvariantError, match="found: nan, and swapped nan"):
        testing.check_view_swap(lambda *views: torch.tensor(math.nan))
    with pytest.raises(InvariantError, match="found: inf, and swapped "):
        testing.check_view_swap(lambda *views: 1 / (views[0][0, 0] - 1).abs())


def test_autocast_is_named() -> None:
    def loss(view0: Tensor, view1: Tensor) -> Tensor:
        return torch.ones(()) * (1 + torch.is_autocast_enabled("cpu"))

    with pytest.raises(InvariantError, match="found: 1, and under autocast to bfloat16 2"):
        testing.check_lower_precision(loss)
    testing.check_lower_precision(loss, autocast=False)


def test_what_is_not_finite_is_named() -> None:
    with pytest.raises(InvariantError, match="found: value inf"):
        testing.check_finite(lambda view: view.sum() / 0, kind=ONE)
    with pytest.raises(InvariantError, match=r"found: gradient of assignments torch.tensor\(\[\["):
        testing.check_finite(lambda view: (view[:, 0] - view[:, 0]).abs().sqrt().sum(), kind=ONE)
    # Of one input alone, the second; the first gets none.
    with pytest.raises(InvariantError, match="found: gradient of assignments1 "):
        testing.check_finite(lambda first, second: (second - second).abs().sqrt().sum())
    testing.check_finite(lambda first, second: second.float().sum())


def test_a_gradient_to_the_target_is_shown() -> None:
    with pytest.raises(InvariantError) as caught:
        testing.check_no_gradient_to_target(lambda p, z: p.sum() + 1e-6 * z.sum())
    assert caught.value.problem == "gradient of target torch.tensor([[1e-06]], dtype=torch.float64)"
    # Less than that is taken for rounding.
    testing.check_no_gradient_to_target(lambda p, z: p.sum() + 1e-9 * z.sum())
    testing.check_no_gradient_to_target(lambda p, z: p.sum())


def test_shapes_and_dtypes_of_results_are_named() -> None:
    with pytest.raises(InvariantError) as caught:
        testing.check_dtype(lambda *views: views[0].double().sum()[None], dtypes=[torch.float16])
    assert caught.value.problem == "shape (1,), torch.float64, in place of (), torch.float32"
    with pytest.raises(InvariantError, match=r"shape \(\), torch.float32, in place of \(\), torch"):
        testing.check_dtype(lambda *views: views[0].float().sum(), dtypes=[torch.float64])


def test_kinks_are_no_wrong_gradient() -> None:
    """At a tie the gradient of a max is one of several; a wrong one is wrong beside it too."""
    testing.check_gradient(lambda view: view.amax(), kind=ONE)
    testing.check_gradient(lambda p, z: (p - z.detach()).clamp_min(0).sum(), kind=EMBEDDED)


def test_gradient_of_the_prediction_alone() -> None:
    testing.check_gradient(lambda p, z: (p * z.detach()).sum(), kind=EMBEDDED)
    with pytest.raises(InvariantError):
        testing.check_gradient(
            lambda p, z: (p.detach() * z + 0 * p).sum() + p.sum() * 2 - (p.sum().detach()),
            kind=EMBEDDED,
            rtol=0.0,
            atol=0.0,
        )


def test_mass_that_moves() -> None:
    """From the heavier of both columns, by its part of the gap, in every row alike."""
    seen: list[tuple[float, float]] = []

    def loss(view: Tensor) -> Tensor:
        mass = view.sum(0)
        seen.append((mass.max().item(), mass.min().item()))
        assert (view > -1e-12).all()
        assert torch.allclose(view.sum(1), torch.ones(len(view), dtype=view.dtype))
        return torch.zeros(())

    # With one row, the heavier of both has a mass below 1.
    testing.check_monotone_entropy(loss, shapes=[(3, 2), (1, 2)], max_examples=100)
    # Nothing changes: that holds without any tolerance.
    testing.check_monotone_entropy(lambda view: torch.zeros(()), rtol=0.0, atol=0.0)
    gaps = [
        (high - low, after_high - after_low)
        for (high, low), (after_high, after_low) in zip(seen[::2], seen[1::2], strict=True)
        if high - low > 1e-6
    ]
    # A quarter of the gap leaves half of it, half leaves none, all of it turns both about.
    parts = {round(after / before, 6) for before, after in gaps}
    assert parts == {0.0, 0.5, 1.0}


# --- sums over shards -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ONE, PAIR, EMBEDDED])
@pytest.mark.parametrize("several", [False, True])
def test_tolerances_of_sums(kind: str, several: bool) -> None:
    def statistic(size: float) -> Callable[..., Any]:
        def of(*views: Tensor) -> Any:
            # Something for each part beside its rows: not a sum over instances.
            total = len(views[0]) + size + 0 * sum(view.sum() for view in views)
            return (total, 2 * total) if several else total

        return of

    with pytest.raises(InvariantError) as caught:
        check_additive_over_shards(statistic(1e-3), kind=kind)  # type: ignore[arg-type]
    first = r"torch.tensor\(2.002, dtype=torch.float64\), whole torch.tensor\(2.001, dtype=torch"
    assert re.match(f"sum over shards {first}", caught.value.problem), caught.value.problem
    for tolerance in ({}, {"rtol": 0.1, "atol": 0.0}, {"rtol": 0.0, "atol": 0.1}):
        size = 1e-3 if tolerance else 1e-6
        check_additive_over_shards(statistic(size), kind=kind, **tolerance)  # type: ignore[arg-type]
    with pytest.raises(InvariantError):
        check_additive_over_shards(statistic(1e-3), kind=kind, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_a_loss_and_its_form_from_sums() -> None:
    def loss(view: Tensor) -> Tensor:
        return 1 + view[:, 0].sum()

    def check(from_sums: Loss, **tolerance: float) -> None:
        check_additive_over_shards(
            functional.cluster_mass,
            loss=loss,
            from_sums=from_sums,
            **tolerance,  # type: ignore[arg-type]
        )

    check(lambda mass: 1 + mass[0])
    cases: list[tuple[Loss, str]] = [
        (lambda mass: 1.001 + mass[0], r"[\d.]+, and from sums over shards [\d.]+"),
        (
            lambda mass: 1 + 1.001 * mass[0] - 0.001 * mass[0].detach(),
            r"gradient of assignments from sums torch.tensor\(\[\[1.001, 0.*, whole .*\[\[1, 0.*",
        ),
        (
            lambda mass: 1 + mass[0].detach(),
            r"gradient of assignments from sums torch.tensor\(\[\[0, 0.*, whole .*\[\[1, 0\]\].*",
        ),
    ]
    for from_sums, problem in cases:
        with pytest.raises(InvariantError) as caught:
            check(from_sums)
        assert re.fullmatch(problem, caught.value.problem), caught.value.problem
    for from_sums, _ in cases[:2]:
        check(from_sums, rtol=0.1, atol=0.0)
        check(from_sums, rtol=0.0, atol=0.1)
        with pytest.raises(InvariantError):
            check(from_sums, rtol=1e-5, atol=1e-5)
    for half in ({"loss": loss}, {"from_sums": loss}):
        with pytest.raises(ValueError, match=r"^loss, from_sums: expected both or neither$"):
            check_additive_over_shards(functional.cluster_mass, **half)


def test_sums_without_gradient() -> None:
    """A loss that depends on its inputs in neither form has nothing to compare."""
    check_additive_over_shards(
        functional.cluster_mass,
        loss=lambda view: torch.tensor(float(len(view))),
        from_sums=lambda mass: mass.detach().sum().float(),
    )


# --- messages -------------------------------------------------------------------------------------


def test_every_part_of_a_message() -> None:
    example = {"view": torch.eye(2)}
    body = "\n  should hold: F\n  found: P\n  smallest example:\n    view = torch.tensor([[1, 0], "
    body += "[0, 1]])"
    wrong = InvariantError("name", "F", "loss", "P", example)
    assert str(wrong) == f"name does not hold for loss{body}"
    raised = LossRaisedError("name", "F", "loss", "P", example)
    assert str(raised) == f"loss raised while name was checked{body}"
    for error in (wrong, raised):
        parts = (error.invariant, error.formula, error.loss, error.problem, error.example)
        assert parts == ("name", "F", "loss", "P", example)


def test_report_is_whole() -> None:
    def raises(view: Tensor) -> Tensor:
        if view.dtype is torch.float64:
            raise KeyError("no")
        return view.float().sum() * 0

    report = check_invariants(raises, ONE, only=["bounds", "dtype"], raises=False)
    assert str(report).split("\n  raised")[0].split("\n") == [
        "raises: 0 of 2 hold",
        *(
            f"  skipped  {name}"
            for name in testing.invariants(ONE)
            if name not in ("bounds", "dtype")
        ),
    ]
    assert "  raised   bounds\n           should hold: lower <= L <= upper\n" in str(report)
    with pytest.raises(InvariantsError) as caught:
        check_invariants(raises, ONE, only=["bounds", "dtype"])
    assert str(caught.value) == str(report)
    assert caught.value.report.failed.keys() == report.failed.keys()
    only_dtype = check_invariants(
        raises, ONE, only=["dtype"], options={"dtype": {"dtypes": [torch.float16]}}
    )
    assert str(only_dtype).startswith("raises: 1 of 1 hold\n  holds    dtype\n  skipped  ")


def test_names() -> None:
    class Long(torch.nn.Module):
        def extra_repr(self) -> str:
            return "x" * 200

    class Called:
        def __call__(self) -> None: ...

        def __repr__(self) -> str:
            return "Called(\n  1)"

    assert name_of(Long()) == "Long(...)"
    assert name_of(BCAContrastiveLoss()).startswith("BCAContrastiveLoss(gather_dist")
    assert "\n" not in name_of(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU()))
    assert name_of(Called()) == "Called( 1)"
    assert name_of(max) == "max"
    assert re.fullmatch(
        r"the lambda in test_testing_arguments\.py, line \d+", name_of(lambda: None)
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.tensor([1e6, 2e6 + 1.0]), "torch.tensor([1000000.0, 2000001.0])"),
        (torch.tensor([999999.0, -0.0]), "torch.tensor([999999, 0])"),
        (torch.tensor([1 / 64, 1 / 65]), "torch.tensor([1/64, 0.0153846154])"),
        (torch.tensor(1 / 3, dtype=torch.float64), "torch.tensor(1/3, dtype=torch.float64)"),
        (torch.tensor([0.1234567890123]), "torch.tensor([0.123456791])"),
        (
            torch.tensor([0.1234567890123], dtype=torch.float64),
            "torch.tensor([0.1234567890123], dtype=torch.float64)",
        ),
        (torch.tensor([[-math.inf]]), "torch.tensor([[float('-inf')]])"),
        (torch.arange(3), "torch.tensor([0, 1, 2], dtype=torch.int64)"),
        ("word", "'word'"),
    ],
)
def test_numbers_in_messages(value: Any, text: str) -> None:
    assert show(value) == text
    if isinstance(value, Tensor):
        again = eval(text, {"torch": torch})
        assert torch.allclose(again.double(), value.double(), rtol=1e-7)


def test_rows_go_on_lines_of_their_own_where_they_are_long() -> None:
    short, long = torch.ones(1, 23), torch.ones(2, 24)
    assert show(short).count("\n") == 0
    row = f"[{', '.join(['1'] * 24)}]"
    assert show(long) == f"torch.tensor([\n        {row},\n        {row}\n    ])"
