"""The testing kit accepts the library's losses and names what is wrong with broken ones."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, configuration, given, settings
from torch import Tensor
from torch.nn.functional import cross_entropy

import c2bin_ext
from c2bin_ext import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    ClusterEntropyRegularizer,
    functional,
    testing,
)
from c2bin_ext._numerics import at_least_float32, inverse_norm, without_autocast
from c2bin_ext.testing import (
    InvariantError,
    InvariantsError,
    LossRaisedError,
    check_additive_over_shards,
    check_bounds,
    check_instance_permutation,
    check_invariants,
    check_value_at_agreement,
    check_view_swap,
    invariants,
)
from c2bin_ext.testing._search import name_of, show

ROOT = Path(c2bin_ext.__file__).parent.parent
EXAMPLES = 15
FIND = settings(database=None, derandomize=True, deadline=None)
Loss = Callable[..., Tensor]


# --- the library's losses keep what they promise -------------------------------------------------


def expected_of_contrast(
    similarity: str, positive: bool, temperature: float, rows: int
) -> dict[str, Callable[[int], float]]:
    """Closed forms at agreement with one row a cluster, and with `rows` rows at the others."""
    keep = 1.0 if positive else 0.0

    def term(own: float, others: float, k: int) -> float:
        return math.log(keep * math.exp(own) + (k - 1) * math.exp(others)) - own

    def agreement(k: int) -> float:
        return term(1 / temperature, 0.0, k)

    def collapse(k: int) -> float:
        full = (rows if similarity == "dot" else 1) / temperature
        return (term(full, 0.0, k) + (k - 1) * term(0.0, 0.0, k)) / k

    def uniform(k: int) -> float:
        return term(0.0, 0.0, k)

    return {"agreement": agreement, "collapse": collapse, "uniform": uniform}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_accepts_contrast(similarity: str, positive: bool, symmetric: bool) -> None:
    temperature, rows = 0.7, 3
    value = expected_of_contrast(similarity, positive, temperature, rows)
    skip = [] if symmetric else ["view_swap"]
    if similarity == "dot":
        skip.append("column_scale")
    report = check_invariants(
        BCAContrastiveLoss(temperature, similarity, positive, symmetric),
        skip=skip,
        options={
            # Of 6 rows at most, all on one cluster in one view.
            "bounds": {"lower": value["agreement"] if positive else -math.inf, "upper": math.inf}
            if similarity == "cosine"
            else {"lower": -math.inf, "upper": math.inf},
            "value_at_agreement": {"value": value["agreement"], "rows_per_cluster": 1},
            "value_at_collapse": {"value": value["collapse"], "rows": rows},
            "value_at_uniform": {"value": value["uniform"], "rows": rows},
        },
        max_examples=EXAMPLES,
    )
    assert set(report.skipped) == set(skip)
    assert set(report.passed) == set(invariants("assignment_pair")) - set(skip)
    assert not report.failed


def test_default_values_are_those_of_the_default_loss() -> None:
    check_invariants(BCAContrastiveLoss(), max_examples=EXAMPLES)


def test_accepts_entropy() -> None:
    report = check_invariants(ClusterEntropyRegularizer(), "assignment", max_examples=EXAMPLES)
    assert report.passed == invariants("assignment")
    check_invariants(
        ClusterEntropyRegularizer("sum"),
        "assignment",
        options={
            "bounds": {"upper": lambda k: 6 * math.log(k)},
            "value_at_collapse": {"value": lambda k: 3 * math.log(k), "rows": 3},
        },
        max_examples=EXAMPLES,
    )


def test_accepts_alignment() -> None:
    report = check_invariants(BootstrapAlignmentLoss(), "embedding_pair", max_examples=EXAMPLES)
    assert report.passed == invariants("embedding_pair")


def test_accepts_whole_objective() -> None:
    def cluster_part(view0: Tensor, view1: Tensor) -> Tensor:
        same = torch.ones(view0.shape[0], 2, dtype=view0.dtype)
        return C2BINLoss()((same, same), (same, same), ((view0,), (view1,))).loss

    # Alignment is 0, and the regularizer adds to contrast at collapse alone.
    agreement = lambda k: 2 * math.log1p((k - 1) * math.exp(-2))  # noqa: E731
    check_invariants(
        cluster_part,
        # The regularizer reads the masses, and so the scale of columns.
        skip=["value_at_collapse", "column_scale"],
        options={
            "bounds": {"lower": agreement, "upper": math.inf},
            "value_at_agreement": {"value": agreement},
            "value_at_uniform": {"value": lambda k: 2 * math.log(k)},
        },
        max_examples=EXAMPLES,
    )


def contrast_sums(view0: Tensor, view1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return view0.T @ view1, view0.square().sum(dim=0), view1.square().sum(dim=0)


def contrast_from_sums(sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    gram, squares0, squares1 = sums
    logits = 2 * gram * inverse_norm(squares0)[:, None] * inverse_norm(squares1)
    labels = torch.arange(len(logits))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def entropy_from_mass(mass: Tensor) -> Tensor:
    share = mass / mass.sum()
    return (share * (len(mass) * share + 1e-36).log()).sum()


def test_accepts_sums_over_shards() -> None:
    check_additive_over_shards(functional.cluster_mass)
    check_additive_over_shards(
        functional.cluster_mass,
        loss=ClusterEntropyRegularizer(),
        from_sums=entropy_from_mass,
        atol=1e-5,
    )
    check_additive_over_shards(
        contrast_sums,
        kind="assignment_pair",
        loss=BCAContrastiveLoss(),
        from_sums=contrast_from_sums,
        max_examples=30,
    )


# --- broken losses: each is caught by the invariants named, and by no other -----------------------


def unit(view: Tensor, axis: int = 0) -> Tensor:
    return view * inverse_norm(view.square().sum(dim=axis, keepdim=True))


def logits_of(view0: Tensor, view1: Tensor, axis: int = 0) -> Tensor:
    view0, view1 = at_least_float32(view0, view1)
    with without_autocast(view0):
        return 2 * unit(view0, axis).T @ unit(view1, axis)


def both_directions(logits: Tensor, weight: Tensor | None = None) -> Tensor:
    labels = torch.arange(len(logits))
    return (cross_entropy(logits, labels, weight) + cross_entropy(logits.T, labels, weight)) / 2


def sound_contrast(view0: Tensor, view1: Tensor) -> Tensor:
    return both_directions(logits_of(view0, view1))


def weights_clusters_by_their_number(view0: Tensor, view1: Tensor) -> Tensor:
    logits = logits_of(view0, view1)
    weight = torch.arange(1, len(logits) + 1, dtype=logits.dtype)
    return both_directions(logits, weight)


def normalises_the_wrong_axis(view0: Tensor, view1: Tensor) -> Tensor:
    return both_directions(logits_of(view0, view1, axis=1))


def multiplies_under_autocast(view0: Tensor, view1: Tensor) -> Tensor:
    view0, view1 = at_least_float32(view0, view1)
    return both_directions((2 * unit(view0).T @ unit(view1)).to(view0.dtype))


def narrows_half_inputs(view0: Tensor, view1: Tensor) -> Tensor:
    if view0.dtype is torch.float16:
        view0, view1 = view0.bfloat16(), view1.bfloat16()
    return sound_contrast(view0, view1)


def halves_the_gradient(view0: Tensor, view1: Tensor) -> Tensor:
    half = sound_contrast(view0, view1) / 2
    return half + half.detach()


def returns_a_row(view0: Tensor, view1: Tensor) -> Tensor:
    return sound_contrast(view0, view1)[None]


def returns_double(view0: Tensor, view1: Tensor) -> Tensor:
    return sound_contrast(view0, view1).double()


def shares_of(view: Tensor) -> Tensor:
    (view,) = at_least_float32(view)
    return view.mean(dim=0)


def flips_the_sign(view: Tensor) -> Tensor:
    share = shares_of(view)
    return -(share * (share + 1e-36).log()).sum()


def takes_log_of_zero(view: Tensor) -> Tensor:
    share = shares_of(view)
    return math.log(len(share)) + torch.xlogy(share, share).sum()


def takes_entropy_of_rows(view: Tensor) -> Tensor:
    (view,) = at_least_float32(view)
    return math.log(view.shape[1]) + (view * (view + 1e-36).log()).sum(dim=1).mean()


def rows_of_cosines(prediction: Tensor, target: Tensor) -> Tensor:
    # One row at a time, by the library: sound at every scale.
    rows = [
        functional.bootstrap_alignment_loss(prediction[i : i + 1], target[i : i + 1])
        for i in range(len(prediction))
    ]
    return torch.stack(rows)


def weights_rows_by_their_number(prediction: Tensor, target: Tensor) -> Tensor:
    rows = rows_of_cosines(prediction, target)
    weight = torch.arange(1, len(rows) + 1, dtype=rows.dtype)
    return (rows * weight).sum() / weight.sum()


def sums_over_rows(prediction: Tensor, target: Tensor) -> Tensor:
    return rows_of_cosines(prediction, target).sum()


def forgets_the_stop_gradient(prediction: Tensor, target: Tensor) -> Tensor:
    reverse = functional.bootstrap_alignment_loss(target, prediction)
    return functional.bootstrap_alignment_loss(prediction, target) + reverse - reverse.detach()


def shortens_embeddings(prediction: Tensor, target: Tensor) -> Tensor:
    prediction, target = at_least_float32(prediction, target.detach())
    length = prediction.norm(dim=1).clamp(1e-12, 1e12) + 0.01
    sound = functional.bootstrap_alignment_loss(prediction, target)
    # 1 - (1 - sound) times something below 1: cosines of short vectors come out too small.
    return 1 - (1 - sound) * (1 - 0.01 / length).mean()


MUTANTS: list[tuple[Loss, Any, set[str]]] = [
    (weights_rows_by_their_number, "embedding_pair", {"instance_permutation"}),
    (sums_over_rows, "embedding_pair", {"bounds"}),
    (forgets_the_stop_gradient, "embedding_pair", {"no_gradient_to_target"}),
    # The value at agreement depends on the length too.
    (
        shortens_embeddings,
        "embedding_pair",
        {"positive_scaling", "value_at_agreement", "view_swap"},
    ),
    # Which cluster holds everything matters.
    (
        weights_clusters_by_their_number,
        "assignment_pair",
        {"cluster_relabelling", "value_at_collapse"},
    ),
    (BCAContrastiveLoss(symmetric=False), "assignment_pair", {"view_swap"}),
    # Without the positive, no value is that of InfoNCE.
    (
        BCAContrastiveLoss(positive_in_denominator=False),
        "assignment_pair",
        {"bounds", "value_at_agreement", "value_at_collapse", "value_at_uniform"},
    ),
    # Of n unit rows, the similarities grow with n.
    (
        normalises_the_wrong_axis,
        "assignment_pair",
        {"column_scale", "bounds", "value_at_agreement", "value_at_collapse"},
    ),
    (halves_the_gradient, "assignment_pair", {"gradient"}),
    (returns_a_row, "assignment_pair", {"dtype"}),
    (returns_double, "assignment_pair", {"dtype"}),
    (multiplies_under_autocast, "assignment_pair", {"lower_precision"}),
    (narrows_half_inputs, "assignment_pair", {"lower_precision"}),
    (takes_log_of_zero, "assignment", {"finite"}),
    # H in place of log K - H: between the same bounds, upside down.
    (
        flips_the_sign,
        "assignment",
        {"monotone_entropy", "value_at_balance", "value_at_collapse", "value_at_uniform"},
    ),
    # Hard balanced clusters count as unbalanced.
    (takes_entropy_of_rows, "assignment", {"value_at_balance"}),
]


@pytest.mark.parametrize(
    ("loss", "kind", "expected"), MUTANTS, ids=[name_of(m[0])[:40] for m in MUTANTS]
)
def test_rejects(loss: Loss, kind: Any, expected: set[str]) -> None:
    report = check_invariants(loss, kind, max_examples=EXAMPLES, raises=False)
    assert set(report.failed) == expected, str(report)
    for name, error in report.failed.items():
        assert isinstance(error, InvariantError)
        assert error.invariant == name
        assert error.loss == report.loss
        for value in error.example.values():
            if isinstance(value, Tensor):
                rows, columns = value.shape
                # Two rows per cluster is the least that shows a dependence on their number.
                assert rows <= (4 if name == "value_at_agreement" else 3), str(error)
                assert columns <= 3, str(error)


def test_every_invariant_has_a_mutant() -> None:
    caught = set().union(*(expected for *_, expected in MUTANTS))
    kinds: list[Any] = ["assignment", "assignment_pair", "embedding_pair"]
    assert caught == {name for kind in kinds for name in invariants(kind)}


def test_the_sound_contrast_of_the_mutants_is_sound() -> None:
    check_invariants(sound_contrast, max_examples=EXAMPLES)


def test_rejects_sums_over_shards() -> None:
    with pytest.raises(InvariantError, match="sum over shards") as caught:
        check_additive_over_shards(lambda view: view.mean(dim=0))
    assert caught.value.example["assignments"].shape == (2, 2)
    assert caught.value.example["shards"] == (1, 1)

    with pytest.raises(InvariantError, match="gradient of assignments"):
        check_additive_over_shards(
            functional.cluster_mass,
            loss=ClusterEntropyRegularizer(),
            from_sums=lambda mass: entropy_from_mass(mass.detach() + (mass - mass.detach()) / 2),
        )
    with pytest.raises(InvariantError, match="from sums over shards"):
        check_additive_over_shards(
            functional.cluster_mass,
            loss=ClusterEntropyRegularizer("sum"),
            from_sums=entropy_from_mass,
        )
    with pytest.raises(ValueError, match="both or neither"):
        check_additive_over_shards(functional.cluster_mass, loss=ClusterEntropyRegularizer())


# --- what a failure looks like --------------------------------------------------------------------


def test_message() -> None:
    with pytest.raises(AssertionError) as caught:
        check_view_swap(BCAContrastiveLoss(symmetric=False))
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("view_swap does not hold for BCAContrastiveLoss(")
    assert lines[1:] == [
        "  should hold: L(view 0, view 1) = L(view 1, view 0)",
        "  found: 0.693147181, and swapped 1.12692801",
        "  smallest example:",
        "    assignments0 = torch.tensor([[1, 0]], dtype=torch.float64)",
        "    assignments1 = torch.tensor([[1/2, 1/2]], dtype=torch.float64)",
    ]


def test_the_example_fails_again_when_pasted() -> None:
    with pytest.raises(InvariantError) as caught:
        check_view_swap(BCAContrastiveLoss(symmetric=False))
    text = [line for line in str(caught.value).split("\n") if "torch.tensor" in line]
    views = [eval(line.split(" = ")[1], {"torch": torch}) for line in text]
    loss = BCAContrastiveLoss(symmetric=False)
    assert loss(*views) != loss(*views[::-1])


def test_examples_repeat() -> None:
    messages = []
    for _ in range(2):
        with pytest.raises(InvariantError) as caught:
            check_view_swap(BCAContrastiveLoss(symmetric=False), max_examples=EXAMPLES)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    with pytest.raises(InvariantError):
        check_view_swap(BCAContrastiveLoss(symmetric=False), derandomize=False, max_examples=200)


def test_exceptions_of_the_loss() -> None:
    def loss(view0: Tensor, view1: Tensor) -> Tensor:
        if len(view0) > 1:
            raise KeyError("two rows")
        return sound_contrast(view0, view1)

    with pytest.raises(LossRaisedError) as caught:
        check_instance_permutation(loss)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.invariant == "instance_permutation"
    assert "loss raised while instance_permutation was checked" in str(caught.value)
    assert "KeyError: 'two rows'" in str(caught.value)
    assert caught.value.example["assignments0"].shape == (2, 2)

    with pytest.raises(InvariantsError) as all_of_them:
        check_invariants(loss, max_examples=EXAMPLES)
    failed = all_of_them.value.report.failed
    assert set(failed) == set(invariants("assignment_pair"))
    assert all(isinstance(error, LossRaisedError) for error in failed.values())
    assert "raised   gradient" in str(all_of_them.value)


def test_exceptions_in_the_backward_pass() -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return tensor.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise NotImplementedError("no backward")

    with pytest.raises(LossRaisedError, match="no backward"):
        testing.check_finite(Raises.apply, kind="assignment", max_examples=5)


@pytest.mark.parametrize(
    ("result", "message"),
    [(1.0, "returns? a scalar tensor, got float"), (torch.ones(2), r"got shape \(2,\)")],
)
def test_results_that_are_no_scalar(result: Any, message: str) -> None:
    with pytest.raises(LossRaisedError, match=message.replace("returns?", "return")):
        check_bounds(lambda *_: result, max_examples=5)


def test_loss_that_differs_from_call_to_call() -> None:
    calls = iter(range(10**6))

    def loss(view: Tensor) -> Tensor:
        return torch.tensor(100.0 if next(calls) == 3 else 0.0)

    with pytest.raises(InvariantError, match="one call and none at the next"):
        check_bounds(loss, kind="assignment", max_examples=EXAMPLES)


def test_lambdas_are_named_by_their_line() -> None:
    with pytest.raises(InvariantError, match=r"the lambda in test_testing\.py, line \d+"):
        check_bounds(lambda a, b: a.sum() + 100, max_examples=5)


def test_report() -> None:
    report = check_invariants(
        BCAContrastiveLoss(symmetric=False),
        only=["view_swap", "dtype"],
        max_examples=EXAMPLES,
        raises=False,
    )
    assert report.passed == ("dtype",)
    assert list(report.failed) == ["view_swap"]
    assert len(report.skipped) == len(invariants("assignment_pair")) - 2
    text = str(report)
    assert text.startswith("BCAContrastiveLoss(")
    assert "1 of 2 hold" in text
    assert "  holds    dtype" in text
    assert "  FAILS    view_swap" in text
    assert "assignments1 = torch.tensor([[1/2, 1/2]]" in text


def test_show() -> None:
    assert show(torch.tensor([[1 / 3, 2 / 3], [0.0, 1.0]])) == "torch.tensor([[1/3, 2/3], [0, 1]])"
    assert show(torch.tensor(0.1)) == "torch.tensor(1/10)"
    assert show(torch.tensor([1e-8, math.inf], dtype=torch.float64)) == (
        "torch.tensor([1e-08, float('inf')], dtype=torch.float64)"
    )
    assert show(torch.tensor([-2.5, math.nan]).half()) == (
        "torch.tensor([-5/2, float('nan')], dtype=torch.float16)"
    )
    assert show((1, 2)) == "(1, 2)"
    assert show(torch.eye(9)).count("\n") == 10
    assert eval(show(torch.eye(9)), {"torch": torch}).equal(torch.eye(9))
    big = torch.tensor([[1e30, -1e-30]])
    assert eval(show(big), {"torch": torch}).equal(big)


# --- how it can be used ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", invariants("assignment"))
def test_under_pytest(name: str) -> None:
    check_invariants(ClusterEntropyRegularizer(), "assignment", only=[name], max_examples=5)


def test_compiled() -> None:
    loss = torch.compile(BCAContrastiveLoss(), backend="eager", fullgraph=True)
    # Each dtype, and each set of tensors with a gradient, is compiled anew: 8 times at most.
    separate = ["finite", "dtype", "lower_precision"]
    check_invariants(loss, skip=separate, shapes=[(4, 2)], max_examples=5)
    for name in separate:
        torch.compiler.reset()
        check_invariants(loss, only=[name], shapes=[(4, 2)], max_examples=5)
    torch.compiler.reset()
    broken = torch.compile(BCAContrastiveLoss(symmetric=False), backend="eager", fullgraph=True)
    with pytest.raises(InvariantError):
        check_view_swap(broken, shapes=[(2, 2)])


def test_shapes() -> None:
    seen: set[tuple[int, ...]] = set()

    def loss(view0: Tensor, view1: Tensor) -> Tensor:
        seen.add(tuple(view0.shape))
        return sound_contrast(view0, view1)

    check_invariants(loss, shapes=[(4, 2), (6, 3)], max_examples=EXAMPLES)
    assert seen == {(4, 2), (6, 3)}
    with pytest.raises(ValueError, match="multiple of K"):
        check_value_at_agreement(loss, shapes=[(4, 3)])


def test_losses_may_write_into_their_inputs() -> None:
    def loss(view0: Tensor, view1: Tensor) -> Tensor:
        value = sound_contrast(view0.clone(), view1.clone())
        view0.zero_()
        return value

    check_invariants(loss, only=["instance_permutation", "view_swap"], max_examples=5)


def test_a_check_of_ones_own() -> None:
    """What the page on the testing kit shows."""
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in page.split("```python\n")]
    namespace: dict[str, Any] = {}
    exec(next(block for block in blocks if "def check_least_at_balance" in block), namespace)
    check = namespace["check_least_at_balance"]
    check(ClusterEntropyRegularizer(), max_examples=EXAMPLES)
    with pytest.raises(InvariantError, match="least_at_balance does not hold for flips_the_sign"):
        check(flips_the_sign)
    with pytest.raises(LossRaisedError, match="raised while least_at_balance was checked"):
        check(torch.linalg.inv)


def test_inside_another_property() -> None:
    @settings(FIND, max_examples=2, suppress_health_check=[HealthCheck.nested_given])
    @given(testing.assignments(rows=2, clusters=2))
    def outer(view: Tensor) -> None:
        check_view_swap(sound_contrast, max_examples=3)

    outer()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "assignments"}, "kind: expected one of"),
        ({"skip": ["view_swaps"]}, r"skip: .* got \['view_swaps'\]"),
        ({"skip": "view_swap"}, "skip: .* got 'view_swap'"),
        ({"only": ["monotone_entropy"]}, r"only: .* got \['monotone_entropy'\]"),
        ({"options": {"limits": {}}}, r"options: .* got \['limits'\]"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_invariants(sound_contrast, **arguments)


def test_kinds_an_invariant_does_not_serve() -> None:
    with pytest.raises(ValueError, match="kind: expected one of"):
        testing.check_cluster_relabelling(sound_contrast, kind="embedding_pair")


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


def test_settings_of_hypothesis_stay() -> None:
    before = configuration.storage_directory("x", intent_to_write=False).path
    with pytest.raises(InvariantError):
        check_view_swap(BCAContrastiveLoss(symmetric=False), max_examples=EXAMPLES)
    assert configuration.storage_directory("x", intent_to_write=False).path == before


def test_import() -> None:
    program = """
import sys
import c2bin_ext
assert "hypothesis" not in sys.modules and "c2bin_ext.testing" not in sys.modules
sys.modules["hypothesis"] = None
try:
    import c2bin_ext.testing
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'pip install "c2bin-ext[testing]"' in done.stdout


def test_all_and_docstrings() -> None:
    assert len(set(testing.__all__)) == len(testing.__all__)
    for name in testing.__all__:
        item = getattr(testing, name)
        if not callable(item) or isinstance(item, type):
            continue
        text = inspect.getdoc(item) or ""
        for part in ("Args:", "Returns:", "Raises:", ">>> ", "Source: "):
            assert part in text, (name, part)
        for parameter in inspect.signature(item).parameters:
            assert f"  {parameter}: " in text, (name, parameter)
    for kind in ("assignment", "assignment_pair", "embedding_pair"):
        for name in invariants(kind):
            assert f"check_{name}" in testing.__all__
