"""torch.compile, torch.export, torch.func, fake tensors, copying, pickling and saving."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import random_assignments, random_embeddings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils._pytree import tree_flatten, tree_map

from c2bin_ext import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    ClusterEntropyRegularizer,
    MultiScaleClusterHead,
    functional,
)

HAS_COMPILER = shutil.which("gcc") is not None and shutil.which("g++") is not None


def assignment(n: int, k: int, seed: int) -> Tensor:
    return random_assignments(n, k, seed, torch.float32)


def embedding(n: int, d: int, seed: int) -> Tensor:
    return random_embeddings(n, d, seed, torch.float32)


def pair(n: int) -> tuple[Any, ...]:
    return assignment(n, 3, 1), assignment(n, 3, 2)


def triple(n: int) -> tuple[Any, ...]:
    return (
        (embedding(n, 4, 1), embedding(n, 4, 2)),
        (embedding(n, 4, 3), embedding(n, 4, 4)),
        tuple(tuple(assignment(n, k, s) for k in (3, 5)) for s in (5, 6)),
    )


Case = tuple[nn.Module, Callable[[int], tuple[Any, ...]]]


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    return {
        "alignment": (
            BootstrapAlignmentLoss(),
            lambda n: (embedding(n, 4, 1), embedding(n, 4, 2)),
        ),
        "bca": (BCAContrastiveLoss(), pair),
        "bca-options": (BCAContrastiveLoss(0.2, "dot", False, False), pair),
        "entropy": (ClusterEntropyRegularizer(), lambda n: (assignment(n, 3, 1),)),
        "entropy-sum": (ClusterEntropyRegularizer("sum"), lambda n: (assignment(n, 3, 1),)),
        "objective": (C2BINLoss(), triple),
        "objective-paper": (C2BINLoss.paper(), triple),
        "head": (MultiScaleClusterHead(4, (3, 5)), lambda n: (embedding(n, 4, 1),)),
    }


NAMES = list(cases())
LOSSES = [name for name in NAMES if name != "head"]
each = pytest.mark.parametrize("name", NAMES)
each_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def scalar(output: Any) -> Tensor:
    """One number that depends on everything a module returns."""
    if isinstance(output, Tensor):
        return output if output.ndim == 0 else (output**2).sum()
    if hasattr(output, "loss"):
        return output.loss
    return sum(((part**2).sum() for part in output), torch.zeros(()))


def leaves_of(arguments: Any) -> tuple[Any, list[Tensor]]:
    live = tree_map(lambda tensor: tensor.detach().clone().requires_grad_(), arguments)
    return live, tree_flatten(live)[0]


def value_and_gradients(function: Callable[..., Any], arguments: Any) -> list[Tensor | None]:
    live, leaves = leaves_of(arguments)
    value = scalar(function(*live))
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]


def agree(actual: list[Any], expected: list[Any]) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        if got is None or wanted is None:
            present = wanted if got is None else got
            assert present is None or bool((present == 0).all())
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


class TestCompile:
    @each
    def test_whole_graph_with_gradients(self, name: str) -> None:
        module, make = cases()[name]
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        agree(
            value_and_gradients(compiled, make(6)),
            value_and_gradients(module, make(6)),
        )

    @each
    def test_dynamic_shapes_compile_once(self, name: str) -> None:
        module, make = cases()[name]
        graphs = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
        for n in (6, 9, 31):
            agree(value_and_gradients(compiled, make(n)), value_and_gradients(module, make(n)))
        assert len(graphs) == 1

    @pytest.mark.parametrize("name", ["objective", "bca-options"])
    def test_dynamic_shapes_with_aot_eager(self, name: str) -> None:
        module, make = cases()[name]
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (6, 9):
            agree(value_and_gradients(compiled, make(n)), value_and_gradients(module, make(n)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_inputs(self, dtype: torch.dtype) -> None:
        module, make = cases()["objective"]
        arguments = tree_map(lambda tensor: tensor.to(dtype), make(6))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        value = compiled(*arguments).loss
        assert value.dtype is torch.float32
        torch.testing.assert_close(value, module(*arguments).loss)

    def test_under_autocast(self) -> None:
        module, make = cases()["objective"]
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = compiled(*make(6)).loss
        torch.testing.assert_close(value, module(*make(6)).loss)

    def test_a_whole_step(self) -> None:
        head, _ = cases()["head"]
        loss = BCAContrastiveLoss()

        def step(first: Tensor, second: Tensor) -> Tensor:
            views = zip(head(first), head(second), strict=True)
            return torch.stack([loss(*view) for view in views]).sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        arguments = embedding(6, 4, 1), embedding(6, 4, 2)
        agree(value_and_gradients(compiled, arguments), value_and_gradients(step, arguments))

    # torch's compiler uses some of torch's own deprecated functions.
    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
    @pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
    def test_inductor(self) -> None:
        module, make = cases()["objective"]
        compiled = torch.compile(module, fullgraph=True, backend="inductor")
        agree(value_and_gradients(compiled, make(6)), value_and_gradients(module, make(6)))


class TestExport:
    def test_head_with_a_dynamic_batch(self) -> None:
        head, make = cases()["head"]
        batch = torch.export.Dim("n", min=2, max=1024)
        program = torch.export.export(head, make(6), dynamic_shapes={"features": {0: batch}})
        for n in (2, 6, 50):
            outputs = program.module()(*make(n))
            for got, wanted in zip(outputs, head(*make(n)), strict=True):
                torch.testing.assert_close(got, wanted)

    def test_head_survives_a_round_trip(self) -> None:
        head, make = cases()["head"]
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(head, make(6)), buffer)
        buffer.seek(0)
        outputs = torch.export.load(buffer).module()(*make(6))
        torch.testing.assert_close(outputs[1], head(*make(6))[1])

    def test_head_is_static_in_everything_else(self) -> None:
        head, make = cases()["head"]
        program = torch.export.export(head, make(6))
        shapes = [tuple(p.shape) for p in program.state_dict.values()]
        assert sorted(shapes) == [(8,), (8, 4)]


class TestFunc:
    @each_loss
    def test_grad(self, name: str) -> None:
        module, make = cases()[name]
        arguments = make(6)

        def function(*inputs: Any) -> Tensor:
            return scalar(module(*inputs))

        actual = tree_flatten(grad(function, argnums=tuple(range(len(arguments))))(*arguments))
        agree(actual[0], value_and_gradients(module, arguments)[1:])

    @each
    def test_vmap_over_a_stack_of_batches(self, name: str) -> None:
        module, make = cases()[name]
        batches = [make(6), tree_map(lambda tensor: tensor.flip(0) * 0.9, make(6)), make(6)]
        stacked = tree_map(lambda *tensors: torch.stack(tensors), *batches)
        outputs = tree_flatten(vmap(module)(*stacked))[0]
        for position, batch in enumerate(batches):
            expected = tree_flatten(module(*batch))[0]
            for got, wanted in zip(outputs, expected, strict=True):
                torch.testing.assert_close(got[position], wanted, rtol=1e-5, atol=1e-6)

    @each_loss
    def test_vmap_of_grad(self, name: str) -> None:
        module, make = cases()[name]
        batches = [make(6), tree_map(lambda tensor: tensor.roll(1, 1), make(6))]
        stacked = tree_map(lambda *tensors: torch.stack(tensors), *batches)

        def function(*inputs: Any) -> Tensor:
            return scalar(module(*inputs))

        positions = tuple(range(len(batches[0])))
        outputs = tree_flatten(vmap(grad(function, argnums=positions))(*stacked))[0]
        for index, batch in enumerate(batches):
            expected = value_and_gradients(module, batch)[1:]
            agree([output[index] for output in outputs], expected)

    @pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 0)])
    def test_vmap_over_one_side(self, in_dims: tuple[Any, Any]) -> None:
        stack = torch.stack([assignment(6, 3, seed) for seed in range(4)])
        single = assignment(6, 3, 9)
        inputs = [single if dim is None else stack.movedim(0, dim) for dim in in_dims]
        outputs = vmap(functional.bca_contrastive_loss, in_dims=in_dims)(*inputs)
        for index in range(4):
            row = [single if dim is None else stack[index] for dim in in_dims]
            torch.testing.assert_close(outputs[index], functional.bca_contrastive_loss(*row))

    def test_jacrev_of_the_mass_is_an_indicator(self) -> None:
        jacobian = jacrev(functional.cluster_mass)(assignment(4, 3, 0))
        expected = torch.eye(3).unsqueeze(1).expand(3, 4, 3)
        assert torch.equal(jacobian, expected)

    @each_loss
    def test_jacrev_is_the_gradient(self, name: str) -> None:
        module, make = cases()[name]
        arguments = make(6)

        def function(*inputs: Any) -> Tensor:
            return scalar(module(*inputs))

        positions = tuple(range(len(arguments)))
        actual = tree_flatten(jacrev(function, argnums=positions)(*arguments))[0]
        agree(actual, value_and_gradients(module, arguments)[1:])

    def test_jacrev_of_the_head(self) -> None:
        head, make = cases()["head"]
        first, second = jacrev(head)(*make(4))
        assert first.shape == (4, 3, 4, 4)
        torch.testing.assert_close(first.sum(dim=1), torch.zeros(4, 4, 4))
        assert second.abs().sum() > 0

    def test_second_derivative_through_func(self) -> None:
        first, second = (view.double() for view in pair(4))

        def norm(view: Tensor) -> Tensor:
            return (grad(functional.bca_contrastive_loss)(view, second) ** 2).sum()

        live = first.clone().requires_grad_()
        value = functional.bca_contrastive_loss(live, second)
        (inner,) = torch.autograd.grad(value, live, create_graph=True)
        (expected,) = torch.autograd.grad((inner**2).sum(), live)
        torch.testing.assert_close(grad(norm)(first), expected)

    def test_functional_call_of_the_head(self) -> None:
        head, make = cases()["head"]
        state = {name: torch.zeros_like(p) for name, p in head.named_parameters()}
        first, second = functional_call(head, state, make(6))
        torch.testing.assert_close(first, torch.full((6, 3), 1 / 3))
        torch.testing.assert_close(second, torch.full((6, 5), 1 / 5))

    def test_ensemble_of_heads(self) -> None:
        heads = [MultiScaleClusterHead(4, (3, 5)) for _ in range(3)]
        state = torch.func.stack_module_state(heads)[0]
        features = embedding(6, 4, 0)

        def one(parameters: dict[str, Tensor]) -> Any:
            return functional_call(heads[0], parameters, (features,))

        outputs = vmap(one)(state)
        for index, head in enumerate(heads):
            torch.testing.assert_close(outputs[1][index], head(features)[1])


class TestFakeTensors:
    @each
    def test_no_data_dependent_access(self, name: str) -> None:
        module, make = cases()[name]
        arguments = make(6)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = tree_map(lambda t: mode.from_tensor(t).requires_grad_(), arguments)
            value = scalar(module(*fakes))
            value.backward()
        assert value.shape == ()
        assert value.dtype is torch.float32
        first = tree_flatten(fakes)[0][0]
        assert first.grad is not None
        assert first.grad.shape == tree_flatten(arguments)[0][0].shape

    @each
    def test_meta_tensors(self, name: str) -> None:
        module, make = cases()[name]
        arguments = tree_map(lambda tensor: tensor.to("meta"), make(6))
        output = module.to("meta")(*arguments)
        assert {part.device.type for part in tree_flatten(output)[0]} == {"meta"}


class TestCopies:
    @each
    @pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
    def test_a_copy_does_the_same(self, name: str, how: str) -> None:
        module, make = cases()[name]
        if how == "pickle":
            duplicate = pickle.loads(pickle.dumps(module))
        elif how == "deepcopy":
            duplicate = copy.deepcopy(module)
        else:
            buffer = io.BytesIO()
            torch.save(module, buffer)
            buffer.seek(0)
            duplicate = torch.load(buffer, weights_only=False)
        assert type(duplicate) is type(module)
        assert repr(duplicate) == repr(module)
        agree(
            [scalar(duplicate(*make(6)))],
            [scalar(module(*make(6)))],
        )

    def test_output_can_be_pickled(self) -> None:
        module, make = cases()["objective"]
        output = module(*make(6))
        restored = pickle.loads(pickle.dumps(output))
        assert type(restored) is type(output)
        assert torch.equal(restored.entropy, output.entropy)

    @pytest.mark.parametrize("name", ["head", "objective"])
    def test_weights_only(self, name: str) -> None:
        module, _ = cases()[name]
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        assert list(state) == list(module.state_dict())
        other = MultiScaleClusterHead(4, (3, 5)) if name == "head" else C2BINLoss(0.1)
        other.load_state_dict(state, strict=True)
        for key, value in other.state_dict().items():
            assert torch.equal(value, module.state_dict()[key])

    def test_a_deepcopied_head_shares_nothing(self) -> None:
        head, _ = cases()["head"]
        follower = copy.deepcopy(head)
        with torch.no_grad():
            head.linear.weight.add_(1.0)
        assert not torch.equal(head.linear.weight, follower.linear.weight)
