"""The modules: configuration, one call into functional, and what that call costs."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from oracle import random_assignments, random_embeddings, rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from c2bin_ext import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    C2BINLossOutput,
    ClusterEntropyRegularizer,
    functional,
)

CONTRAST = {
    "temperature": 0.2,
    "similarity": "dot",
    "positive_in_denominator": False,
    "symmetric": False,
}
OBJECTIVE = {
    **CONTRAST,
    "cluster_weight": 0.3,
    "entropy_weight": 0.6,
    "symmetric_alignment": False,
    "reduction": "sum",
}
PAPER = {
    "similarity": "dot",
    "positive_in_denominator": False,
    "symmetric": False,
    "symmetric_alignment": False,
    "reduction": "sum",
}
NUMBER_ERRORS = [
    (BCAContrastiveLoss, "temperature"),
    (C2BINLoss, "temperature"),
    (C2BINLoss, "cluster_weight"),
    (C2BINLoss, "entropy_weight"),
]


def inputs(n: int = 6, heads: tuple[int, ...] = (3, 5)) -> tuple[Any, ...]:
    return (
        tuple(random_embeddings(n, 4, seed) for seed in (1, 2)),
        tuple(random_embeddings(n, 4, seed) for seed in (3, 4)),
        tuple(tuple(random_assignments(n, k, s + k) for k in heads) for s in (10, 20)),
    )


def expected(arguments: tuple[Any, ...], **options: Any) -> tuple[float, ...]:
    predictions, targets, assignments = arguments
    return oracle.total(
        [rows(view) for view in predictions],
        [rows(view) for view in targets],
        [[rows(head) for head in view] for view in assignments],
        **options,
    )


def same(actual: Tensor, wanted: float) -> None:
    torch.testing.assert_close(
        actual, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def signature(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self"}


class TestSignatures:
    def test_bca(self) -> None:
        assert signature(BCAContrastiveLoss) == {
            "temperature": 0.5,
            "similarity": "cosine",
            "positive_in_denominator": True,
            "symmetric": True,
            "gather_distributed": False,
            "validate_args": False,
            "running_decay": 0.0,
            "num_clusters": None,
        }
        assert list(signature(BCAContrastiveLoss)) == [
            "temperature",
            "similarity",
            "positive_in_denominator",
            "symmetric",
            "gather_distributed",
            "validate_args",
            "running_decay",
            "num_clusters",
        ]

    def test_entropy(self) -> None:
        assert list(signature(ClusterEntropyRegularizer).items()) == [
            ("reduction", "mean"),
            ("gather_distributed", False),
            ("validate_args", False),
            ("running_decay", 0.0),
            ("num_clusters", None),
        ]

    def test_alignment(self) -> None:
        assert signature(BootstrapAlignmentLoss) == {
            "gather_distributed": False,
            "validate_args": False,
        }

    def test_objective(self) -> None:
        options = signature(C2BINLoss)
        assert list(options)[:2] == ["cluster_weight", "entropy_weight"]
        assert options == {
            "cluster_weight": 2.0,
            "entropy_weight": 1.0,
            "temperature": 0.5,
            "similarity": "cosine",
            "positive_in_denominator": True,
            "symmetric": True,
            "symmetric_alignment": True,
            "reduction": "mean",
            "gather_distributed": False,
            "validate_args": False,
            "running_decay": 0.0,
            "num_clusters": None,
        }

    def test_functions_share_the_defaults_of_the_modules(self) -> None:
        for function, module in (
            (functional.bootstrap_alignment_loss, BootstrapAlignmentLoss),
            (functional.bca_contrastive_loss, BCAContrastiveLoss),
            (functional.cluster_entropy_regularizer, ClusterEntropyRegularizer),
            (functional.c2bin_loss, C2BINLoss),
        ):
            options = {
                p.name: p.default
                for p in inspect.signature(function).parameters.values()
                if p.kind is p.KEYWORD_ONLY
            }
            shared = signature(module)
            # What a module keeps over steps it makes itself and passes on as `running`; the sums of
            # a larger batch are an argument of the call.
            kept = {"running": None} if shared.pop("running_decay", None) is not None else {}
            shared.pop("num_clusters", None)
            at_the_call = {"statistics": None, "target_assignments": None}
            at_the_call = at_the_call if module is C2BINLoss else {}
            assert options == {**shared, **kept, **at_the_call}


class TestForward:
    @pytest.mark.parametrize("options", [{}, CONTRAST])
    def test_bca(self, options: dict[str, Any]) -> None:
        first, second = random_assignments(6, 4, 1), random_assignments(6, 4, 2)
        value = BCAContrastiveLoss(**options)(first, second)
        same(value, oracle.contrast(rows(first), rows(second), **options))

    @pytest.mark.parametrize("option", CONTRAST)
    def test_bca_passes_on_every_option(self, option: str) -> None:
        first, second = random_assignments(6, 4, 1), random_assignments(6, 4, 2)
        options = {option: CONTRAST[option]}
        value = BCAContrastiveLoss(**options)(first, second)
        same(value, oracle.contrast(rows(first), rows(second), **options))
        assert abs(value - BCAContrastiveLoss()(first, second)) > 1e-5

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_entropy(self, reduction: str) -> None:
        assignments = random_assignments(6, 4)
        value = ClusterEntropyRegularizer(reduction)(assignments)
        same(value, oracle.entropy_regularizer(rows(assignments), reduction=reduction))

    def test_alignment(self) -> None:
        prediction, target = random_embeddings(6, 4, 1), random_embeddings(6, 4, 2)
        value = BootstrapAlignmentLoss()(prediction, target)
        same(value, oracle.alignment(rows(prediction), rows(target)))

    @pytest.mark.parametrize("option", [None, *OBJECTIVE])
    def test_objective(self, option: str | None) -> None:
        options = {} if option is None else {option: OBJECTIVE[option]}
        output = C2BINLoss(**options)(*inputs())
        assert isinstance(output, C2BINLossOutput)
        for got, wanted in zip(output, expected(inputs(), **options), strict=True):
            same(got, wanted)
        if option is not None:
            assert abs(output.loss - C2BINLoss()(*inputs()).loss) > 1e-5

    def test_objective_by_keyword(self) -> None:
        predictions, targets, assignments = inputs()
        output = C2BINLoss()(predictions=predictions, targets=targets, assignments=assignments)
        assert torch.equal(output.loss, C2BINLoss()(*inputs()).loss)

    def test_modules_by_keyword(self) -> None:
        first, second = random_assignments(6, 4, 1), random_assignments(6, 4, 2)
        bca, align = BCAContrastiveLoss(), BootstrapAlignmentLoss()
        assert bca(assignments0=first, assignments1=second) == bca(first, second)
        assert align(prediction=first, target=second) == align(first, second)
        entropy = ClusterEntropyRegularizer()
        assert entropy(assignments=first) == entropy(first)

    def test_lists_are_as_good_as_tuples(self) -> None:
        predictions, targets, assignments = inputs()
        output = C2BINLoss()(list(predictions), list(targets), [list(a) for a in assignments])
        assert torch.equal(output.loss, C2BINLoss()(*inputs()).loss)

    @pytest.mark.parametrize("n", [1, 6])
    def test_paper(self, n: int) -> None:
        output = C2BINLoss.paper()(*inputs(n))
        for got, wanted in zip(output, expected(inputs(n), **PAPER), strict=True):
            same(got, wanted)

    def test_paper_takes_overrides(self) -> None:
        overrides: dict[str, Any] = {"cluster_weight": 0.1, "temperature": 1.0}
        loss = C2BINLoss.paper(**overrides, similarity="cosine")
        options = {**PAPER, **overrides, "similarity": "cosine"}
        same(loss(*inputs()).loss, expected(inputs(), **options)[0])

    def test_recommended(self) -> None:
        options: dict[str, Any] = {"entropy_weight": 2.0, "similarity": "dot"}
        loss = C2BINLoss.recommended(**options)
        options |= {"cluster_weight": 0.5, "temperature": 0.1}
        same(loss(*inputs()).loss, expected(inputs(), **options)[0])
        assert C2BINLoss.recommended(temperature=0.3).temperature == 0.3

    @pytest.mark.parametrize("form", ["paper", "recommended"])
    def test_forms_of_a_subclass(self, form: str) -> None:
        class Mine(C2BINLoss):
            pass

        assert type(getattr(Mine, form)()) is Mine

    def test_second_alignment_has_no_influence_when_one_sided(self) -> None:
        predictions, targets, assignments = inputs()
        other = (predictions[0], random_embeddings(6, 4, 99))
        loss = C2BINLoss(symmetric_alignment=False)
        assert torch.equal(
            loss(predictions, targets, assignments).alignment,
            loss(other, targets, assignments).alignment,
        )


class TestState:
    @pytest.mark.parametrize(
        "module",
        [BCAContrastiveLoss, BootstrapAlignmentLoss, ClusterEntropyRegularizer, C2BINLoss],
    )
    def test_nothing_to_save_or_train(self, module: type[nn.Module]) -> None:
        assert module().state_dict() == {}
        assert list(module().parameters()) == []

    def test_repr_shows_the_configuration(self) -> None:
        for module, options in (
            (BCAContrastiveLoss, CONTRAST),
            (ClusterEntropyRegularizer, {"reduction": "sum", "gather_distributed": True}),
            (C2BINLoss, OBJECTIVE),
        ):
            text = repr(module(**options))
            assert text.startswith(module.__name__)
            for name, value in options.items():
                assert f"{name}={value!r}" in text or f"{name}={value}" in text

    def test_options_are_attributes(self) -> None:
        loss = C2BINLoss(**OBJECTIVE)
        for name, value in OBJECTIVE.items():
            assert getattr(loss, name) == value


class TestErrors:
    @pytest.mark.parametrize(("module", "name"), NUMBER_ERRORS)
    @pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
    def test_values(self, module: type[nn.Module], name: str, wrong: float, complains: Any) -> None:
        with complains(ValueError, name, str(wrong)):
            module(**{name: wrong})

    @pytest.mark.parametrize(("module", "name"), NUMBER_ERRORS)
    @pytest.mark.parametrize("wrong", ["1", None, True])
    def test_types(self, module: type[nn.Module], name: str, wrong: Any, complains: Any) -> None:
        with complains(TypeError, name, type(wrong).__name__):
            module(**{name: wrong})

    @pytest.mark.parametrize("module", [BCAContrastiveLoss, C2BINLoss])
    def test_temperature_zero_but_weights_may_be(
        self, module: type[nn.Module], complains: Any
    ) -> None:
        with complains(ValueError, "temperature", "0"):
            module(temperature=0)
        C2BINLoss(cluster_weight=0, entropy_weight=0)

    @pytest.mark.parametrize("module", [BCAContrastiveLoss, C2BINLoss])
    def test_similarity(self, module: type[nn.Module], complains: Any) -> None:
        with complains(ValueError, "similarity", "'l2'", "cosine", "dot"):
            module(similarity="l2")

    @pytest.mark.parametrize("module", [ClusterEntropyRegularizer, C2BINLoss])
    def test_reduction(self, module: type[nn.Module], complains: Any) -> None:
        with complains(ValueError, "reduction", "'none'", "mean", "sum"):
            module(reduction="none")

    def test_validate_args_reaches_the_check(self, complains: Any) -> None:
        good, bad = random_assignments(6, 4), torch.rand(6, 4) + 1
        BCAContrastiveLoss()(good, bad)
        ClusterEntropyRegularizer()(bad)
        with complains(ValueError, "assignments1"):
            BCAContrastiveLoss(validate_args=True)(good, bad)
        with complains(ValueError, "assignments"):
            ClusterEntropyRegularizer(validate_args=True)(bad)
        nan = torch.full((6, 4), math.nan)
        BootstrapAlignmentLoss()(nan, nan)
        with complains(ValueError, "prediction"):
            BootstrapAlignmentLoss(validate_args=True)(nan, good)
        predictions, targets, _ = inputs()
        with complains(ValueError, "assignments"):
            C2BINLoss(validate_args=True)(predictions, targets, ((good,), (bad,)))

    def test_shape_errors_reach_the_caller(self, complains: Any) -> None:
        with complains(ValueError, "assignments1", "4, 3", "4, 2"):
            BCAContrastiveLoss()(torch.rand(4, 3), torch.rand(4, 2))
        with complains(ValueError, "assignments", "(3,)"):
            ClusterEntropyRegularizer()(torch.rand(3))
        with complains(ValueError, "target", "4, 3", "4, 2"):
            BootstrapAlignmentLoss()(torch.rand(4, 3), torch.rand(4, 2))


class Recorder(TorchDispatchMode):
    """The operator and the shape of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.seen.append((func.__name__, tuple(value.shape)))
        return result


class TestCost:
    n, heads = 60, (20, 30)

    def leaves(self) -> tuple[Any, ...]:
        predictions, targets, assignments = inputs(self.n, self.heads)
        leaves = tuple(tuple(h.requires_grad_() for h in view) for view in assignments)
        return tuple(p.requires_grad_() for p in predictions), targets, leaves

    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    def test_memory_is_of_order_n_k_plus_k_squared(self, similarity: str) -> None:
        arguments = self.leaves()
        with Recorder() as recorder:
            C2BINLoss(similarity=similarity)(*arguments).loss.backward()
        largest = max(math.prod(shape) for _, shape in recorder.seen)
        total = sum(self.heads)
        assert largest <= 2 * max(self.n * total, total**2)

    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    def test_one_gram_matrix_per_head(self, similarity: str) -> None:
        arguments = self.leaves()
        with Recorder() as recorder:
            C2BINLoss(similarity=similarity)(*arguments)
        grams = [
            shape[-1]
            for name, shape in recorder.seen
            if name.split(".")[0] in {"mm", "bmm", "addmm", "baddbmm"}
            and shape[-2:] in {(k, k) for k in self.heads}
        ]
        assert sorted(grams) == sorted(self.heads)

    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    def test_no_loop_over_clusters_or_instances(self, similarity: str) -> None:
        counts = set()
        for n, k in itertools.product([10, 40], [4, 16]):
            with Recorder() as recorder:
                C2BINLoss(similarity=similarity)(*inputs(n, (k,)))
            counts.add(len(recorder.seen))
        assert len(counts) == 1
