"""Messages word for word where only their words matter, and the options that modules check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ASSIGNED,
    CASES,
    EXTREMES,
    Case,
    close,
    flat,
    over,
    random_assignments,
    random_embeddings,
)
from helpers import signature
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from c2bin_ext import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    C2BINObjective,
    ClusterEntropyRegularizer,
    MultiScaleClusterHead,
    MultiScaleClusterLoss,
    functional,
)

LOSSES = [
    BootstrapAlignmentLoss,
    BCAContrastiveLoss,
    ClusterEntropyRegularizer,
    MultiScaleClusterLoss,
    C2BINLoss,
]
# Every option by what it takes, of every module that has it.
FLAGS, NUMBERS, CHOICES = (
    [
        (module, name)
        for module in LOSSES
        for name, default in signature(module)
        if type(default) is kind
    ]
    for kind in (bool, float, str)
)


@pytest.mark.parametrize(("module", "name"), FLAGS)
def test_flags(module: Any, name: str) -> None:
    with pytest.raises(TypeError) as caught:
        module(**{name: 1})
    assert str(caught.value) == f"{name}: expected True or False, got 1 of type int"


@pytest.mark.parametrize(("module", "name"), NUMBERS)
@pytest.mark.parametrize("wrong", [-1, -1e-9, math.nan, math.inf, -math.inf])
def test_numbers(module: Any, name: str, wrong: float, complains: Any) -> None:
    bound = "> 0" if name == "temperature" else ">= 0"
    with complains(ValueError, f"{name}: expected a finite number {bound}, got {wrong!r}"):
        module(**{name: wrong})
    if name != "temperature":
        assert getattr(module(**{name: 0}), name) == 0
        return
    for zero in (0, 0.0):
        with complains(ValueError, f"temperature: expected a finite number > 0, got {zero}"):
            module(temperature=zero)


@pytest.mark.parametrize(("module", "name"), NUMBERS)
@pytest.mark.parametrize("wrong", ["1", None, True, [0.5]])
def test_number_types(module: Any, name: str, wrong: Any, complains: Any) -> None:
    with complains(TypeError, f"{name}: expected a finite number", f"type {type(wrong).__name__}"):
        module(**{name: wrong})


def test_numbers_of_other_libraries() -> None:
    class Float64(float):
        """As numpy's is a float."""

    assert BCAContrastiveLoss(temperature=Float64(0.5)).temperature == 0.5


@pytest.mark.parametrize(("module", "name"), CHOICES)
@pytest.mark.parametrize("wrong", ["euclidean", "Cosine", "SUM", "none", ""])
def test_choices(module: Any, name: str, wrong: str, complains: Any) -> None:
    options = {"similarity": ("cosine", "dot"), "reduction": ("mean", "sum")}[name]
    with complains(ValueError, f"{name}: expected one of {options}, got {wrong!r}"):
        module(**{name: wrong})
    with complains(TypeError, f"{name}: expected one of {options}, got 1 of type int"):
        module(**{name: 1})


@over(where=lambda case: not (case.micro or "features" in case.name or "head" in case.name))
def test_functions_check_their_options(case: Case, complains: Any) -> None:
    module = case.build()
    function = FUNCTIONS[type(module)]
    arguments, given = list(case.arguments()), {}
    if "follower" in case.name:
        given["target_assignments"] = arguments.pop()
    for name, default in signature(type(module)):
        wrong: Any = {bool: 1, str: "other", float: -1.0}[type(default)]
        kind = TypeError if type(default) is bool else ValueError
        with complains(kind, f"{name}: expected", str(wrong)):
            function(*arguments, **given, **{name: wrong})


def test_bias_flag() -> None:
    with pytest.raises(TypeError) as caught:
        MultiScaleClusterHead(4, (2,), bias=0)
    assert str(caught.value) == "bias: expected True or False, got 0 of type int"


def test_head_on_another_device() -> None:
    with pytest.raises(ValueError, match="features") as caught:
        MultiScaleClusterHead(4, (2, 3))(torch.ones(2, 4, device="meta"))
    assert str(caught.value) == (
        "features: expected device cpu as the head's weight has, got device meta"
    )


def test_smallest_head() -> None:
    assert MultiScaleClusterHead(1, (2,))(torch.ones(1, 1))[0].shape == (1, 2)


PAIR = (torch.eye(2),) * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: functional.cluster_assignments(torch.ones(3), (2, 3)),
            "logits: expected shape (n, ΣK), got shape (3,)",
        ),
        (
            lambda: functional.cluster_assignments(torch.ones(3, 1), (2, 3)),
            "logits: expected shape (n, ΣK) with n >= 1 and ΣK >= 2, got shape (3, 1)",
        ),
        (
            lambda: functional.cluster_assignments(torch.ones(3, 6), (2, 3)),
            "logits: expected 5 columns for num_clusters (2, 3), got shape (3, 6)",
        ),
        (
            lambda: MultiScaleClusterHead(3)(torch.ones(2, 4)),
            "features: expected shape (n, 3) for in_features=3, got shape (2, 4)",
        ),
        (
            lambda: C2BINObjective(2, (2,))(PAIR, PAIR, (*PAIR, PAIR[0])),
            "features: expected a pair (r0, r1), got 3 items",
        ),
        (
            lambda: C2BINObjective(2, (2,))(PAIR, PAIR, PAIR, PAIR[:1]),
            "target_features: expected a pair (f0, f1), got 1 items",
        ),
        (
            lambda: objective(assignments=([torch.ones(4, 2) / 2],) * 2),
            "assignments[0][0]: expected n = 2 rows as predictions[0] has, got shape (4, 2)",
        ),
        (
            lambda: functional.cluster_entropy_regularizer(torch.tensor([[3.0, -1.0]] * 2)),
            "assignments: expected values >= 0 as of softmax(logits, dim=1), got -1; are these the "
            "logits?",
        ),
        (
            lambda: functional.cluster_mass(torch.ones(0, 3)),
            "assignments: expected shape (n, K) with n >= 1 and K >= 2, got shape (0, 3)",
        ),
        (
            lambda: functional.cluster_mass(torch.ones(3)),
            "assignments: expected shape (n, K), got shape (3,)",
        ),
        (
            lambda: MultiScaleClusterHead(3)(torch.ones(3)),
            "features: expected shape (n, d), got shape (3,)",
        ),
        (
            lambda: functional.bootstrap_alignment_loss(torch.ones(3), torch.ones(3)),
            "prediction: expected shape (n, d), got shape (3,)",
        ),
        (
            lambda: functional.bootstrap_alignment_loss(torch.ones(3, 2), torch.ones(3)),
            "target: expected shape (n, d), got shape (3,)",
        ),
        (
            lambda: functional.cluster_entropy_regularizer(torch.ones(2)),
            "assignments: expected shape (n, K), got shape (2,)",
        ),
        (lambda: C2BINLoss(temperature=10**400), f"temperature: expected a finite number > 0, "
         f"got {10**400}"),
        (lambda: MultiScaleClusterHead(0), "in_features: expected an int >= 1, got 0"),
    ],
)  # fmt: skip
def test_value_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"expected") as caught:
        call()
    assert str(caught.value) == message


def objective(**overrides: Any) -> Any:
    x, head = torch.eye(2), (torch.eye(2),)
    given = {"predictions": (x, x), "targets": (x, x), "assignments": (head, head)}
    return functional.c2bin_loss(**{**given, **overrides})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: functional.cluster_mass([0.5]),
            "assignments: expected a tensor of shape (n, K), got list",
        ),
        (
            lambda: functional.cluster_mass(torch.ones(3, 2, dtype=torch.int64)),
            "assignments: expected a floating-point tensor, got dtype torch.int64",
        ),
        (
            lambda: functional.c2bin_statistics(PAIR, PAIR, (PAIR, PAIR), symmetric_alignment="no"),
            "symmetric_alignment: expected True or False, got 'no' of type str",
        ),
        (lambda: MultiScaleClusterHead("8"), "in_features: expected an int >= 1, got '8' of type "
         "str"),
        (lambda: MultiScaleClusterHead(8, 4), "num_clusters: expected a sequence of ints >= 2 "
         "such as (32, 64, 128), got 4 of type int"),
        (lambda: objective(predictions=torch.ones(2, 2, 2)), "predictions: expected a pair "
         "(p0, p1), got Tensor"),
        (lambda: objective(targets={}), "targets: expected a pair (z0, z1), got dict"),
        (lambda: objective(assignments=torch.ones(2, 2)), "assignments: expected a pair "
         "(heads of view 0, heads of view 1), got Tensor"),
        (lambda: objective(assignments=(torch.eye(2), torch.eye(2))), "assignments[0]: expected a "
         "sequence of (n, K) tensors, one per head, got Tensor"),
        (lambda: objective(assignments=([torch.eye(2)], 3)), "assignments[1]: expected a "
         "sequence of (n, K) tensors, one per head, got int"),
    ],
)  # fmt: skip
def test_type_errors(call: Any, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message


def test_no_heads_in_one_view() -> None:
    for heads in (((), ()), ((torch.eye(2),), ()), ((), (torch.eye(2),))):
        with pytest.raises(ValueError, match="assignments") as caught:
            objective(assignments=heads)
        assert str(caught.value) == (
            "assignments: expected the same number of heads, one at least, for both views, "
            f"got {len(heads[0])} and {len(heads[1])}"
        )


def validate(assignments: Tensor) -> None:
    functional.cluster_entropy_regularizer(assignments, validate_args=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_softmax_passes_validation_also_after_a_cast(dtype: torch.dtype) -> None:
    for k in (2, 128):
        view = random_embeddings(64, k).to(dtype).softmax(dim=1)
        for tensor in (view, view.float(), view.double()):
            validate(tensor)


@pytest.mark.parametrize(("scale", "fails"), [(1.0099, False), (1.0101, True), (0.9899, True)])
def test_tolerance_of_row_sums(scale: float, fails: bool) -> None:
    view = torch.full((3, 2), 0.5, dtype=torch.float64)
    view[1] *= scale
    if not fails:
        validate(view)
        return
    with pytest.raises(ValueError, match=r"row 1") as caught:
        validate(view)
    assert str(caught.value) == (
        "assignments: expected rows that sum to 1 (softmax over clusters), "
        f"got {scale:.6g} in row 1"
    )


def pairs_of(wrong: int, place: int, tensor: torch.Tensor) -> dict[str, Any]:
    """The arguments of the objective with one tensor exchanged."""
    x, heads = torch.eye(2), (torch.eye(2), torch.ones(2, 3) / 3)
    given: list[list[Any]] = [[x, x], [x, x], [list(heads), list(heads)]]
    if wrong < 2:
        given[wrong][place] = tensor
    else:
        given[2][place][1] = tensor
    return dict(zip(("predictions", "targets", "assignments"), given, strict=True))


@pytest.mark.parametrize(
    ("wrong", "place", "shape", "message"),
    [
        (0, 0, (2, 3), "targets[1]: expected shape (2, 3) as predictions[0] has, got shape (2, 2)"),
        (0, 1, (2, 3), "targets[0]: expected shape (2, 3) as predictions[1] has, got shape (2, 2)"),
        (1, 0, (3, 2), "targets[0]: expected shape (2, 2) as predictions[1] has, got shape (3, 2)"),
        (2, 1, (2, 4), "assignments[1][1]: expected shape (2, 3) as assignments[0][1] has, "
         "got shape (2, 4)"),
        (2, 0, (2, 4), "assignments[1][1]: expected shape (2, 4) as assignments[0][1] has, "
         "got shape (2, 3)"),
    ],
)  # fmt: skip
def test_which_tensor_of_the_objective(
    wrong: int, place: int, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match="expected shape") as caught:
        objective(**pairs_of(wrong, place, torch.ones(shape)))
    assert str(caught.value) == message


def test_widths_of_the_two_predictions() -> None:
    x, y = torch.ones(2, 2), torch.ones(2, 3)
    with pytest.raises(ValueError, match="predictions") as caught:
        objective(predictions=(x, y), targets=(y, x))
    assert str(caught.value) == (
        "predictions[1]: expected shape (2, 2) as predictions[0] has, got shape (2, 3)"
    )


def test_heads_on_another_device() -> None:
    heads = (torch.ones(2, 2, device="meta"),)
    with pytest.raises(ValueError, match="device") as caught:
        objective(assignments=(heads, heads))
    assert str(caught.value) == (
        "assignments[0][0]: expected device cpu as predictions[0] has, got device meta"
    )


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
FUNCTIONS: dict[type[nn.Module], Callable[..., Any]] = {
    BootstrapAlignmentLoss: functional.bootstrap_alignment_loss,
    BCAContrastiveLoss: functional.bca_contrastive_loss,
    ClusterEntropyRegularizer: functional.cluster_entropy_regularizer,
    MultiScaleClusterLoss: functional.multi_scale_cluster_loss,
    C2BINLoss: functional.c2bin_loss,
}


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

    def test_contrast_of_too_few_clusters(self, which: str, complains: Any) -> None:
        for k in (0, 1):
            with complains(ValueError, "assignments0", f"4, {k}", TWO_CLUSTERS):
                functional.bca_contrastive_loss(torch.rand(4, k), torch.rand(4, k))


class TestAssignmentErrors:
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


def objective_inputs(n: int = 4, d: int = 3) -> tuple[Any, ...]:
    predictions, targets = (tuple(random_embeddings(n, d, s + v) for v in (0, 1)) for s in (1, 3))
    return predictions, targets, CASES["clusters"].arguments(n)[0]


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
            functional.c2bin_loss(*CASES["objective"].arguments(0))


INTEGER = ("int", "integer")


class TestHeadErrors:
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
            getattr(MultiScaleClusterHead(6, (2, 3)), method)(torch.rand(shape))

    @pytest.mark.parametrize("method", ["forward", "logits"])
    def test_width(self, method: str, complains: Any) -> None:
        with complains(ValueError, "features", "4, 5", "6"):
            getattr(MultiScaleClusterHead(6, (2, 3)), method)(torch.rand(4, 5))

    @pytest.mark.parametrize("method", ["forward", "logits"])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_dtype(self, method: str, dtype: torch.dtype, complains: Any) -> None:
        with complains(TypeError, "features", str(dtype), "float"):
            getattr(MultiScaleClusterHead(6, (2, 3)), method)(torch.ones(4, 6, dtype=dtype))

    @pytest.mark.parametrize("method", ["forward", "logits"])
    def test_not_a_tensor(self, method: str, complains: Any) -> None:
        with complains(TypeError, "features", "list", ("tensor", "Tensor")):
            getattr(MultiScaleClusterHead(6, (2, 3)), method)([[1.0] * 6])


FOLLOWED = [case for case in ASSIGNED if "follower" in case.name and not case.micro]


class TestFollowerErrors:
    @over(cases=FOLLOWED)
    def test_messages(self, case: Case, complains: Any) -> None:
        *inputs, fixed = case.arguments(4)
        loss = case.build()
        with complains(TypeError, "target_assignments[0]: expected a sequence", "Tensor"):
            loss(*inputs, (fixed[0][0], fixed[1]))
        with complains(ValueError, "target_assignments: expected heads of [2, 5, 3] clusters",
                       "[2, 5]"):  # fmt: skip
            loss(*inputs, tuple(view[:2] for view in fixed))
        short = tuple([head[:3] for head in view] for view in fixed)
        with complains(ValueError, "target_assignments[0][0]: expected n = 4 rows", "(3, 2)"):
            loss(*inputs, short)
        with complains(TypeError, "target_assignments: expected a pair", "Tensor"):
            loss(*inputs, fixed[0][0])

    @over(cases=FOLLOWED)
    def test_devices(self, case: Case, complains: Any) -> None:
        *inputs, fixed = case.arguments(4)
        with complains(ValueError, "target_assignments[0][0]", "device cpu", "device meta"):
            case.build()(*inputs, tree_map(lambda t: t.to("meta"), fixed))


class TestClusterErrors:
    def test_messages(self, complains: Any) -> None:
        loss, ((first, second),) = MultiScaleClusterLoss(), CASES["clusters"].arguments(4)
        with complains(TypeError, "assignments: expected a pair (heads of view 0", "Tensor"):
            loss(torch.ones(2, 4, 2))
        with complains(TypeError, "assignments[1]: expected a sequence", "Tensor"):
            loss((first, second[0]))
        for heads in (((), ()), (first, second[:-1])):
            with complains(
                ValueError,
                "assignments: expected the same number of heads, one at "
                f"least, for both views, got {len(heads[0])} and {len(heads[1])}",
            ):
                loss(heads)
        with complains(ValueError, "assignments[1][0]: expected shape (4, 2) as assignments[0][0]"):
            loss((first, second[::-1]))
        with complains(ValueError, "assignments[", "(3, 3)", "4"):
            loss(((*first[:-1], first[-1][:3]), (*second[:-1], second[-1][:3])))
        with complains(ValueError, "assignments[0][0]", "4, 1", TWO_CLUSTERS):
            loss(((first[0][:, :1],), (second[0][:, :1],)))
        with complains(TypeError, "assignments[0][0]", "torch.int64", FLOATING):
            loss(((first[0].long(),), (second[0],)))
        with complains(ValueError, "assignments[", "0", ONE_ROW):
            loss(CASES["clusters"].arguments(0)[0])
        with complains(ValueError, "assignments[", "device cpu", "device meta"):
            loss((first, tuple(head.to("meta") for head in second)))


# Values ---------------------------------------------------------------------------------------

SPOILED = ["nan", "inf", "-inf", "row sum", "negative"]


def spoil(assignments: Tensor, how: str) -> Tensor:
    spoiled = assignments.detach().clone()
    if how == "negative":
        spoiled[1, 0], spoiled[1, 1] = -0.25, spoiled[1, :2].sum() + 0.25
    elif how == "row sum":
        spoiled[1] *= 1.25
    elif how == "logits":
        spoiled.log_()
    elif how == "rounding":
        spoiled[1, 0] = -0.009
    else:
        spoiled[1, 0] = float(how)
    return spoiled


def one_by_one(case: Case, how: str) -> list[tuple[str, Any]]:
    """The arguments with one matrix of assignments spoiled, and its name, for each in turn."""
    arguments = case.arguments(4)
    if case.name.startswith("contrast"):
        names = ["assignments0", "assignments1"]
    elif case.name.startswith("entropy"):
        names = ["assignments"]
    else:
        kinds = ["assignments", *["target_assignments"] * ("follower" in case.name)]
        names = [f"{kind}[{v}][{h}]" for kind in kinds for v in range(2) for h in range(3)]
    tensors, structure = tree_flatten(arguments)
    first, found = len(tensors) - len(names), []
    for position, name in enumerate(names, start=first):
        changed = [spoil(t, how) if i == position else t for i, t in enumerate(tensors)]
        found.append((name, tree_unflatten(changed, structure)))
    return found


class TestValidation:
    @pytest.mark.parametrize("how", SPOILED)
    @over(cases=ASSIGNED)
    def test_assignments(self, case: Case, how: str, complains: Any) -> None:
        for name, arguments in one_by_one(case, how):
            words = {"row sum": "sum to 1", "negative": "expected values >= 0"}
            with complains(ValueError, f"{name}: ", words.get(how, "expected finite values")):
                case.build(validate_args=True)(*arguments)

    @pytest.mark.parametrize("how", ["nan", "inf", "-inf"])
    @over(where=lambda case: case.frozen != () and "cluster" not in case.name)
    def test_embeddings(self, case: Case, how: str, complains: Any) -> None:
        arguments = case.arguments(4)
        tensors, structure = tree_flatten(arguments)
        sides = range(2 if case.name == "alignment" else 4)
        used = (0, 3) if not case.options.get("symmetric_alignment", True) else sides
        for position in used:
            names = ("predictions[0]", "predictions[1]", "targets[0]", "targets[1]")
            name = ("prediction", "target")[position] if len(sides) == 2 else names[position]
            changed = [spoil(t, how) if i == position else t for i, t in enumerate(tensors)]
            given = tree_unflatten(changed, structure)
            with complains(ValueError, f"{name}: expected finite values, got 1 NaN or infinite"):
                case.build(validate_args=True)(*given)
            assert not torch.isfinite(flat(case.build()(*given))).all()

    @pytest.mark.filterwarnings("error")
    @over("validation")
    def test_what_is_right_is_accepted_and_unchanged(self, case: Case) -> None:
        arguments = tree_map(lambda t: t.requires_grad_(), case.arguments())
        close(case.build(validate_args=True)(*arguments), case.build()(*arguments), 0)

    @pytest.mark.parametrize("extreme", EXTREMES[:5], ids=lambda extreme: extreme.__name__)
    @over(cases=ASSIGNED)
    def test_extremes_and_rounded_rows_are_accepted(self, case: Case, extreme: Any) -> None:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            arguments = case.arguments(6, dtype, assignments=extreme, heads=(2, 100))
            assert torch.isfinite(flat(case.build(validate_args=True)(*arguments))).all()

    @pytest.mark.parametrize("how", ["nan", "inf", "row sum"])
    @over(cases=ASSIGNED)
    def test_by_default_values_pass_through(self, case: Case, how: str) -> None:
        plain = flat(case.build()(*case.arguments(4)))
        for name, arguments in one_by_one(case, how):
            value = flat(case.build()(*arguments))
            if how == "row sum":
                assert torch.isfinite(value).all()
                assert (value - plain).abs().max() > 1e-6, name
            else:
                assert not torch.isfinite(value).all(), name


class TestLogits:
    """Logits handed in by mistake, found on a CPU without asking for it."""

    @pytest.mark.parametrize("how", ["logits", "-inf"])
    @over(cases=ASSIGNED)
    def test_are_refused(self, case: Case, how: str, complains: Any) -> None:
        for name, arguments in one_by_one(case, how):
            with complains(ValueError, f"{name}: ", "expected values >= 0", "softmax"):
                case.build()(*arguments)

    @over(cases=ASSIGNED)
    def test_rounding_below_zero_is_not_refused(self, case: Case) -> None:
        for _, arguments in one_by_one(case, "rounding"):
            assert torch.isfinite(flat(case.build()(*arguments))).all()

    @over(cases=ASSIGNED)
    def test_nothing_is_read_under_torch_func(self, case: Case) -> None:
        _, arguments = one_by_one(case, "logits")[0]
        batched = tree_map(lambda t: t[None], arguments)
        assert flat(torch.func.vmap(case.build())(*batched)).numel() > 0

    @pytest.mark.parametrize("name", ["contrast", "entropy mean", "clusters"])
    def test_nothing_is_read_when_compiled(self, name: str) -> None:
        _, arguments = one_by_one(CASES[name], "logits")[0]
        compiled = torch.compile(CASES[name].build(), fullgraph=True, backend="eager")
        assert flat(compiled(*arguments)).numel() > 0
        torch._dynamo.reset()

    def test_masses_of_anything_are_taken(self) -> None:
        logits = random_assignments(4, 3).log()
        close(functional.cluster_mass(logits), logits.sum(dim=0))
