"""Messages word for word where only their words matter, and the options that modules check."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from c2bin_ext import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    ClusterEntropyRegularizer,
    MultiScaleClusterHead,
    _checks,
    functional,
)

FLAGS = [
    (BootstrapAlignmentLoss, "gather_distributed"),
    (BootstrapAlignmentLoss, "validate_args"),
    (BCAContrastiveLoss, "positive_in_denominator"),
    (BCAContrastiveLoss, "symmetric"),
    (BCAContrastiveLoss, "gather_distributed"),
    (BCAContrastiveLoss, "validate_args"),
    (ClusterEntropyRegularizer, "gather_distributed"),
    (ClusterEntropyRegularizer, "validate_args"),
    (C2BINLoss, "positive_in_denominator"),
    (C2BINLoss, "symmetric"),
    (C2BINLoss, "symmetric_alignment"),
    (C2BINLoss, "gather_distributed"),
    (C2BINLoss, "validate_args"),
]


@pytest.mark.parametrize(("module", "name"), FLAGS)
def test_flags(module: Any, name: str) -> None:
    with pytest.raises(TypeError) as caught:
        module(**{name: 1})
    assert str(caught.value) == f"{name}: expected True or False, got 1 of type int"


@pytest.mark.parametrize(("module", "name"), FLAGS)
def test_flag_defaults(module: Any, name: str) -> None:
    on = {"positive_in_denominator", "symmetric", "symmetric_alignment"}
    assert getattr(module(), name) is (name in on)


def test_bias_flag() -> None:
    with pytest.raises(TypeError) as caught:
        MultiScaleClusterHead(4, (2,), bias=0)  # type: ignore[arg-type]
    assert str(caught.value) == "bias: expected True or False, got 0 of type int"


def test_repr_is_a_constructor_call() -> None:
    assert repr(ClusterEntropyRegularizer("sum")) == (
        "ClusterEntropyRegularizer(gather_distributed=False, validate_args=False, reduction='sum')"
    )
    assert eval(repr(C2BINLoss.paper())).__dict__.keys() == C2BINLoss().__dict__.keys()
    head = repr(MultiScaleClusterHead(4, (2, 3)))
    assert head.startswith("MultiScaleClusterHead(\n  in_features=4, num_clusters=(2, 3)\n")


def test_head_on_another_device() -> None:
    with pytest.raises(ValueError, match="features") as caught:
        MultiScaleClusterHead(4, (2, 3))(torch.ones(2, 4, device="meta"))
    assert str(caught.value) == (
        "features: expected device cpu as the head's weight has, got device meta"
    )


def test_smallest_head() -> None:
    assert MultiScaleClusterHead(1, (2,))(torch.ones(1, 1))[0].shape == (1, 2)


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
            lambda: functional.cluster_entropy_regularizer(torch.eye(2), reduction="none"),
            "reduction: expected one of ('mean', 'sum'), got 'none'",
        ),
        (
            lambda: functional.cluster_entropy_regularizer(torch.ones(2)),
            "assignments: expected shape (n, K), got shape (2,)",
        ),
        (lambda: BCAContrastiveLoss(temperature=0), "temperature: expected a finite number > 0, "
         "got 0"),
        (lambda: C2BINLoss(cluster_weight=-1), "cluster_weight: expected a finite number >= 0, "
         "got -1"),
        (lambda: C2BINLoss(entropy_weight=-1), "entropy_weight: expected a finite number >= 0, "
         "got -1"),
        (lambda: C2BINLoss(temperature=10**400), f"temperature: expected a finite number > 0, "
         f"got {10**400}"),
        (lambda: BCAContrastiveLoss(similarity="l2"), "similarity: expected one of "
         "('cosine', 'dot'), got 'l2'"),
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
        (lambda: MultiScaleClusterHead("8"), "in_features: expected an int >= 1, got '8' of type "
         "str"),
        (lambda: MultiScaleClusterHead(8, 4), "num_clusters: expected a sequence of ints >= 2 "
         "such as (32, 64, 128), got 4 of type int"),
        (lambda: BCAContrastiveLoss(similarity=1), "similarity: expected one of "
         "('cosine', 'dot'), got 1 of type int"),
        (lambda: BCAContrastiveLoss(temperature="1"), "temperature: expected a finite number > 0, "
         "got '1' of type str"),
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_softmax_passes_validation_also_after_a_cast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    view = torch.randn(64, 128).to(dtype).softmax(dim=1)
    for tensor in (view, view.float(), view.double()):
        _checks.validate_assignments("assignments", tensor)


@pytest.mark.parametrize(("scale", "fails"), [(1.0099, False), (1.0101, True), (0.9899, True)])
def test_tolerance_of_row_sums(scale: float, fails: bool) -> None:
    view = torch.full((3, 2), 0.5, dtype=torch.float64)
    view[1] *= scale
    if not fails:
        _checks.validate_assignments("assignments", view)
        return
    with pytest.raises(ValueError, match=r"row 1") as caught:
        _checks.validate_assignments("assignments", view)
    assert str(caught.value) == (
        "assignments: expected rows that sum to 1 (softmax over clusters), "
        f"got {scale:.6g} in row 1"
    )


def pairs_of(wrong: int, place: int, tensor: torch.Tensor) -> dict[str, Any]:
    """The arguments of the objective with one tensor exchanged."""
    x, heads = torch.eye(2), (torch.eye(2), torch.ones(2, 3) / 3)
    given = [[x, x], [x, x], [list(heads), list(heads)]]
    if wrong < 2:
        given[wrong][place] = tensor
    else:
        given[2][place][1] = tensor  # type: ignore[call-overload]
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


X, HEADS = torch.eye(2), ((torch.eye(2),),) * 2


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (functional.bootstrap_alignment_loss, ["gather_distributed", "validate_args"]),
        (functional.bca_contrastive_loss,
         ["positive_in_denominator", "symmetric", "gather_distributed", "validate_args"]),
        (lambda x, _, **more: functional.cluster_entropy_regularizer(x, **more),
         ["gather_distributed", "validate_args"]),
        (lambda x, _, **more: functional.c2bin_loss((x, x), (x, x), HEADS, **more),
         ["positive_in_denominator", "symmetric", "symmetric_alignment", "gather_distributed",
          "validate_args"]),
    ],
)  # fmt: skip
def test_flags_of_functions(call: Any, names: list[str]) -> None:
    for name in names:
        with pytest.raises(TypeError) as caught:
            call(X, X, **{name: 1})
        assert str(caught.value) == f"{name}: expected True or False, got 1 of type int"
