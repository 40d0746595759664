"""The modules: every form against the oracle, configuration, and what a call costs."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any, get_type_hints

import pytest
import torch
from cases import (
    ASSIGNED,
    CASES,
    OPTIONS,
    PRINTED,
    TABLE_5,
    Batch,
    Case,
    close,
    evaluate,
    head_of,
    leaves,
    over,
    random_embeddings,
    scalar,
)
from helpers import Recorder, signature
from torch import Tensor, nn
from typing_extensions import assert_type

from c2bin_ext import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    C2BINLossOutput,
    C2BINObjective,
    ClusterEntropyRegularizer,
    ClusterLossOutput,
    MultiScaleClusterLoss,
    functional,
)

LOSSES = {
    BootstrapAlignmentLoss: functional.bootstrap_alignment_loss,
    BCAContrastiveLoss: functional.bca_contrastive_loss,
    ClusterEntropyRegularizer: functional.cluster_entropy_regularizer,
    MultiScaleClusterLoss: functional.multi_scale_cluster_loss,
    C2BINLoss: functional.c2bin_loss,
}
COMMON: list[tuple[str, Any]] = [("gather_distributed", False), ("validate_args", False)]
CONTRAST: list[tuple[str, Any]] = [
    ("similarity", "cosine"),
    ("positive_in_denominator", True),
    ("symmetric", True),
]
SIGNATURES: dict[type[nn.Module], list[tuple[str, Any]]] = {
    BootstrapAlignmentLoss: COMMON,
    BCAContrastiveLoss: [("temperature", 0.5), *CONTRAST, *COMMON],
    ClusterEntropyRegularizer: [("reduction", "mean"), *COMMON],
    MultiScaleClusterLoss: [
        ("entropy_weight", 1.0),
        ("temperature", 0.1),
        *CONTRAST,
        ("reduction", "mean"),
        *COMMON,
    ],
    C2BINLoss: [
        ("cluster_weight", 0.5),
        ("entropy_weight", 1.0),
        ("temperature", 0.1),
        *CONTRAST,
        ("symmetric_alignment", True),
        ("reduction", "mean"),
        *COMMON,
    ],
}


class TestOracle:
    @over("n = 1")
    @pytest.mark.parametrize("n", [1])
    def test_value_of_one_instance(self, case: Case, n: int) -> None:
        self.test_value_and_gradients(case, n)

    @over()
    @pytest.mark.parametrize("n", [2, 5])
    def test_value_and_gradients(self, case: Case, n: int) -> None:
        module, arguments = case.build(), case.arguments(n)
        values, gradients = evaluate(module, arguments)
        expected, expected_gradients = case.expected(module, arguments)
        close(values, expected, 1e-11)
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            close(found, wanted, 1e-6)

    @over()
    def test_targets_and_the_follower_get_no_gradient(self, case: Case) -> None:
        live, _ = leaves(case.arguments())
        scalar(case.build()(*live)).backward()
        frozen = {id(leaf) for i in case.frozen if i < len(live) for leaf in leaves_in(live[i])}
        for leaf in leaves_in(live):
            if id(leaf) in frozen:
                assert leaf.grad is None
            elif case.options.get("symmetric_alignment", True):
                assert leaf.grad is not None
                assert leaf.grad.abs().sum() > 0

    @over(where=lambda case: case.frozen != ())
    def test_detaching_what_is_frozen_changes_nothing(self, case: Case) -> None:
        """Also where a frozen tensor is computed from one that is trained."""
        module, arguments = case.build(), case.arguments()
        shared, _ = leaves(arguments)
        detached, _ = leaves(arguments)
        results = []
        for live, cut in ((shared, lambda t: t), (detached, Tensor.detach)):
            first = leaves_in(live[0])[0]
            given = [
                map_tensors(lambda t, f=first, c=cut: t.detach() + c(f).sum(), a)
                if i in case.frozen
                else a
                for i, a in enumerate(live)
            ]
            results.append(torch.autograd.grad(scalar(module(*given)), first)[0])
        close(results[0], results[1])

    @over(cases=[case for case in CASES.values() if head_of(case.build()) is None])
    def test_the_module_is_the_function(self, case: Case) -> None:
        if not case.micro:
            loss, arguments = case.build(), case.arguments()
            names = list(inspect.signature(loss.forward).parameters)
            output = LOSSES[type(loss)](**dict(zip(names, arguments, strict=False)), **case.options)
            close(output, loss(*arguments), 0)


def leaves_in(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [t for branch in tree for t in leaves_in(branch)]


def map_tensors(function: Any, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    return tuple(map_tensors(function, branch) for branch in tree)


class TestOutput:
    @over("n = 1")
    def test_kinds(self, case: Case) -> None:
        output = case.build()(*case.arguments(1))
        names = {
            3: ("loss", "contrast", "entropy"),
            4: ("loss", "alignment", "contrast", "entropy"),
        }
        if hasattr(output, "loss"):
            assert output._fields == names[len(output)]
            assert type(output) in (C2BINLossOutput, ClusterLossOutput)
            assert {part.shape for part in output} == {()}
            assert output.loss is output[0]
        elif isinstance(output, Tensor):
            assert output.shape == ()

    @over(where=lambda case: "objective" in case.name or "clusters" in case.name)
    def test_every_part_has_its_own_gradient(self, case: Case) -> None:
        live, tensors = leaves(case.arguments())
        output = case.build()(*live)
        options = {"cluster_weight": 0.5, "entropy_weight": 1.0} | case.options
        weights = {
            "loss": -1.0,
            "alignment": 1.0,
            "contrast": options["cluster_weight"],
            "entropy": options["cluster_weight"] * options["entropy_weight"],
        }
        if isinstance(output, ClusterLossOutput):
            weights |= {"contrast": 1.0, "entropy": options["entropy_weight"]}
        combined = sum(weights[name] * part for name, part in output._asdict().items())
        close(combined.detach(), 0.0)
        for gradient in torch.autograd.grad(combined, tensors, allow_unused=True):
            assert gradient is None or gradient.abs().max() < 1e-12

    @over(where=lambda case: case.inputs is CASES["objective"].inputs)
    def test_lists_and_keywords(self, case: Case) -> None:
        if case.micro:
            return
        loss = case.build()
        predictions, targets, assignments = case.arguments()
        expected = loss(predictions, targets, assignments)
        close(loss(list(predictions), list(targets), [list(a) for a in assignments]), expected, 0)
        close(loss(predictions=predictions, targets=targets, assignments=assignments), expected, 0)

    def test_modules_by_keyword(self) -> None:
        first, second = CASES["contrast"].arguments()
        bca, align = BCAContrastiveLoss(), BootstrapAlignmentLoss()
        assert bca(assignments0=first, assignments1=second) == bca(first, second)
        assert align(prediction=first, target=second) == align(first, second)
        entropy = ClusterEntropyRegularizer()
        assert entropy(assignments=first) == entropy(first)
        own, fixed = CASES["clusters and follower"].arguments()
        clusters = MultiScaleClusterLoss()
        assert clusters(assignments=own, target_assignments=fixed) == clusters(own, fixed)

    @over(where=lambda case: case.name.startswith("objective, "))
    def test_every_option_counts(self, case: Case) -> None:
        arguments = case.arguments()
        other = C2BINLoss()(*arguments).loss
        assert abs(case.build()(*arguments).loss - other) > 1e-5

    def test_second_alignment_has_no_influence_when_one_sided(self) -> None:
        predictions, targets, assignments = CASES["objective"].arguments()
        other = (predictions[0], random_embeddings(6, 4, 99))
        loss = C2BINLoss(symmetric_alignment=False)
        assert torch.equal(
            loss(predictions, targets, assignments).alignment,
            loss(other, targets, assignments).alignment,
        )


class TestConfiguration:
    @pytest.mark.parametrize("module", SIGNATURES)
    def test_types_of_options(self, module: type[nn.Module]) -> None:
        declared = get_type_hints(module)
        for name, kind in get_type_hints(module.__init__).items():
            assert name == "return" or declared[name] is kind

    def test_types_of_options_under_mypy(self) -> None:
        assert_type(BootstrapAlignmentLoss().validate_args, bool)
        assert_type(BCAContrastiveLoss().temperature, float)
        assert_type(ClusterEntropyRegularizer().reduction, str)
        assert_type(MultiScaleClusterLoss().entropy_weight, float)
        loss = C2BINObjective(4).loss
        assert_type(loss.cluster_weight, float)
        assert_type(loss.symmetric, bool)
        loss.cluster_weight *= 0.5  # a schedule
        assert loss.cluster_weight == 0.25

    @pytest.mark.parametrize("module", SIGNATURES)
    def test_signature(self, module: type[nn.Module]) -> None:
        assert signature(module) == SIGNATURES[module]

    @pytest.mark.parametrize("module", SIGNATURES)
    def test_functions_share_the_defaults_of_the_modules(self, module: type[nn.Module]) -> None:
        parameters = inspect.signature(LOSSES[module]).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        at_the_call = {
            name: None
            for name in ("target_assignments", "statistics")
            if name in inspect.signature(module.forward).parameters
        }
        assert options == dict(SIGNATURES[module]) | at_the_call

    @pytest.mark.parametrize("module", SIGNATURES)
    def test_nothing_to_save_or_train(self, module: type[nn.Module]) -> None:
        assert module().state_dict() == {}
        assert list(module().parameters()) == []

    @pytest.mark.parametrize("module", SIGNATURES)
    def test_options_are_attributes_and_the_repr_is_a_constructor_call(
        self, module: type[nn.Module]
    ) -> None:
        known = dict(SIGNATURES[module])
        options = {name: v for name, v in OPTIONS.items() if name in known}
        loss = module(**options, gather_distributed=True)
        again = eval(repr(loss))
        assert type(again) is module
        for name, value in (known | options | {"gather_distributed": True}).items():
            assert getattr(loss, name) == getattr(again, name) == value
            assert f"{name}={value!r}" in repr(loss)

    def test_paper_is_the_printed_formulas_with_table_5(self) -> None:
        loss, printed = C2BINLoss.paper(), PRINTED | TABLE_5 | {"entropy_weight": 1.0}
        assert {name: getattr(loss, name) for name in printed} == printed

    def test_paper_takes_overrides(self) -> None:
        overrides = {"cluster_weight": 0.1, "temperature": 1.0, "similarity": "cosine"}
        arguments = CASES["objective"].arguments()
        close(
            C2BINLoss.paper(**overrides)(*arguments), C2BINLoss(**PRINTED | overrides)(*arguments)
        )

    def test_paper_of_a_subclass(self) -> None:
        class Mine(C2BINLoss):
            pass

        assert type(Mine.paper()) is Mine

    @pytest.mark.parametrize("name", ["recommended", "running"])
    def test_what_was_removed_is_gone(self, name: str) -> None:
        assert not hasattr(C2BINLoss(), name)


class TestCost:
    n, heads = 60, (20, 30)

    @over(where=lambda case: not case.name.startswith("head"))
    def test_memory_is_of_order_n_k_plus_k_squared(self, case: Case) -> None:
        module, arguments = case.build(), case.arguments(self.n, heads=self.heads)
        with Recorder() as recorder:
            evaluate(module, arguments)
        largest = max(math.prod(shape) for _, shape in recorder.seen)
        total = sum(self.heads)
        assert largest <= 2 * max(self.n * total, total**2)

    @over(cases=ASSIGNED, where=lambda case: "entropy " not in case.name[:8])
    def test_one_gram_matrix_per_contrasted_pair(self, case: Case) -> None:
        arguments = case.arguments(self.n, heads=self.heads)
        heads: tuple[int, ...] = self.heads
        with Recorder() as recorder:
            case.build()(*arguments)
        grams = [
            shape
            for name, shape in recorder.seen
            if name.split(".")[0] in {"mm", "bmm", "addmm", "baddbmm"}
            and shape[-2:] in {(k, k) for k in heads}
        ]
        found = sorted(k for shape in grams for k in [shape[-1]] * math.prod(shape[:-2]))
        if case.name.startswith("contrast"):
            heads = heads[-1:]
        # Each micro-batch once for the sums and once for its loss.
        times = (2 if "follower" in case.name else 1) * (4 if case.micro else 1)
        assert found == sorted(heads * times)

    @over(cases=ASSIGNED)
    def test_no_loop_over_clusters_or_instances(self, case: Case) -> None:
        counts = set()
        for n, k in itertools.product([10, 40], [4, 16]):
            module, arguments = case.build(), case.inputs(Batch(n, heads=(k,)))
            with Recorder() as recorder:
                module(*arguments)
            counts.add(len(recorder.seen))
        assert len(counts) == 1
