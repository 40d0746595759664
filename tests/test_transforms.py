"""torch.compile, torch.export, torch.func, copying, pickling and saving, over every form."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    HEADS,
    Case,
    close,
    evaluate,
    flat,
    head_of,
    over,
    random_assignments,
    random_embeddings,
    scalar,
)
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from c2bin_ext import BCAContrastiveLoss, C2BINLoss, MultiScaleClusterHead
from c2bin_ext.functional import bca_contrastive_loss, cluster_mass

HAS_COMPILER = shutil.which("gcc") is not None and shutil.which("g++") is not None
loads_forward_mode = pytest.mark.filterwarnings("ignore:`?torch.jit.script")
# Symbolic shapes are slow to trace: one row of a kind.
DYNAMIC = [
    "alignment",
    "contrast",
    "contrast dot, positive left out, one way",
    "entropy sum",
    "objective in micro-batches",
    "paper",
    "features and follower",
    "head, hidden, evaluated",
]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def agree(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    close(found[0], expected[0], tolerance)
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        close(gradient, wanted, tolerance)


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    @over()
    def test_whole_graph_with_gradients(self, case: Case) -> None:
        # Each micro-batch is traced anew, and so are the heads in it: with one head, in half the
        # time; those graphs and those of the objective by itself are others' rows already.
        micro = "micro-batches" in case.name
        module, arguments = case.build(), case.arguments(heads=HEADS[:1] if micro else HEADS[:2])
        backend = "eager" if micro and head_of(module) is not None else "aot_eager"
        compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
        agree(evaluate(compiled, arguments), evaluate(module, arguments))

    @pytest.mark.parametrize("name", DYNAMIC)
    def test_dynamic_shapes_compile_once(self, name: str) -> None:
        case, graphs = CASES[name], []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        module = case.build()
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
        for n in (6, 9, 31):
            arguments = case.arguments(n)
            agree(evaluate(compiled, arguments), evaluate(module, arguments))
        assert len(graphs) == 1

    def test_dynamic_shapes_with_aot_eager(self) -> None:
        case = CASES["clusters and follower"]
        module = case.build()
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (6, 9):
            arguments = case.arguments(n, heads=HEADS[:1])
            agree(evaluate(compiled, arguments), evaluate(module, arguments))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", ["objective", "features and follower"])
    def test_half_inputs(self, name: str, dtype: torch.dtype) -> None:
        module, arguments = CASES[name].build().float(), CASES[name].arguments(dtype=dtype)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        value = compiled(*arguments).loss
        assert value.dtype is torch.float32
        close(value, module(*arguments).loss, 1e-5)

    @pytest.mark.parametrize("name", ["objective", "features and follower"])
    def test_under_autocast(self, name: str) -> None:
        case = CASES[name]
        module, arguments = case.build().float(), case.arguments(dtype=torch.float32)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = compiled(*arguments).loss
        close(value, module(*arguments).loss, 1e-5)

    def test_a_whole_step(self) -> None:
        head, loss = MultiScaleClusterHead(4, (3, 5)), BCAContrastiveLoss()

        def step(first: Tensor, second: Tensor) -> Tensor:
            views = zip(head(first), head(second), strict=True)
            return torch.stack([loss(*view) for view in views]).sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        arguments = tuple(random_embeddings(6, 4, seed, torch.float32) for seed in (1, 2))
        agree(evaluate(compiled, arguments), evaluate(step, arguments), 1e-5)

    # torch's compiler uses some of torch's own deprecated functions.
    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
    @pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
    def test_inductor(self) -> None:
        # The formula with most operators of its own: each kernel takes the C++ compiler seconds.
        case = CASES["contrast"]
        module, arguments = case.build().float(), case.arguments(dtype=torch.float32)
        compiled = torch.compile(module, fullgraph=True, backend="inductor")
        agree(evaluate(compiled, arguments), evaluate(module, arguments), 1e-4)


evaluated_heads = over("n = 1", where=lambda case: case.name.startswith("head"))


class TestExport:
    @evaluated_heads
    def test_head_with_a_dynamic_batch(self, case: Case) -> None:
        head = case.build()
        batch = torch.export.Dim("n", min=2, max=1024)
        program = torch.export.export(
            head, case.arguments(6), dynamic_shapes={"features": {0: batch}}
        )
        for n in (2, 6, 50):
            outputs = program.module()(*case.arguments(n))
            close(outputs, head(*case.arguments(n)), 1e-12)
        assert {name for name, _ in head.named_parameters()} <= set(program.state_dict)

    @evaluated_heads
    def test_head_survives_a_round_trip(self, case: Case) -> None:
        head, buffer = case.build(), io.BytesIO()
        torch.export.save(torch.export.export(head, case.arguments()), buffer)
        buffer.seek(0)
        outputs = torch.export.load(buffer).module()(*case.arguments())
        close(outputs, head(*case.arguments()), 1e-12)


def stacked(batches: list[Any]) -> Any:
    # tree_map takes one tree alone before torch 2.3.
    leaves = zip(*(tree_flatten(batch)[0] for batch in batches), strict=True)
    return tree_unflatten([*map(torch.stack, leaves)], tree_flatten(batches[0])[1])


class TestFunc:
    @over("func")
    @pytest.mark.parametrize("transform", [grad, jacrev])
    def test_gradient(self, case: Case, transform: Callable[..., Any]) -> None:
        module, arguments = case.build(), case.arguments()
        argnums = tuple(range(len(arguments)))
        found = transform(lambda *given: scalar(module(*given)), argnums=argnums)(*arguments)
        agree((torch.ones(()), tree_flatten(found)[0]),
              (torch.ones(()), evaluate(module, arguments)[1][: len(tree_flatten(found)[0])]),
              )  # fmt: skip

    @loads_forward_mode
    @over("func")
    def test_jvp_is_the_slope_along_the_gradient(self, case: Case) -> None:
        module, arguments = case.build(), case.arguments()
        tangents = tree_map(torch.randn_like, arguments)
        value, slope = jvp(lambda *given: scalar(module(*given)), arguments, tangents)[:2]
        _, gradients = evaluate(module, arguments)
        expected = sum(
            (t * g).sum() for t, g in zip(tree_flatten(tangents)[0], gradients, strict=False)
        )
        close(slope, expected, 1e-10)
        close(value, scalar(module(*arguments)).detach(), 1e-12)

    @over("func")
    def test_vmap_of_values_and_of_gradients(self, case: Case) -> None:
        module = case.build()
        batches = [case.arguments(seed=1000 * i) for i in range(3)]
        outputs = vmap(module)(*stacked(batches))
        argnums = tuple(range(len(batches[0])))
        gradients = vmap(grad(lambda *given: scalar(module(*given)), argnums=argnums))(
            *stacked(batches)
        )
        for i, batch in enumerate(batches):
            values, expected = evaluate(module, batch)
            close(flat(tree_map(lambda t, i=i: t[i], outputs)).detach(), values)
            for found, wanted in zip(tree_flatten(gradients)[0], expected, strict=False):
                close(found[i].detach(), wanted, 1e-10)

    @over(where=lambda case: "func" in case.refuses)
    def test_what_is_said_to_be_refused_is(self, case: Case) -> None:
        module, arguments = case.build(), case.arguments()
        with pytest.raises(RuntimeError, match=r"in[- ]?place"):
            vmap(module)(*stacked([arguments, arguments]))

    @pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 0)])
    def test_vmap_over_one_side(self, in_dims: tuple[Any, Any]) -> None:
        stack = torch.stack([random_assignments(6, 3, seed) for seed in range(4)])
        single = random_assignments(6, 3, 9)
        inputs = [single if dim is None else stack.movedim(0, dim) for dim in in_dims]
        outputs = vmap(bca_contrastive_loss, in_dims=in_dims)(*inputs)
        for index in range(4):
            row = [single if dim is None else stack[index] for dim in in_dims]
            close(outputs[index], bca_contrastive_loss(*row))

    def test_jacrev_of_the_mass_is_an_indicator(self) -> None:
        jacobian = jacrev(cluster_mass)(random_assignments(4, 3))
        expected = torch.eye(3).unsqueeze(1).expand(3, 4, 3)
        assert torch.equal(jacobian.float(), expected)

    def test_second_derivative_through_func(self) -> None:
        first, second = (random_assignments(4, 3, seed) for seed in (1, 2))

        def norm(view: Tensor) -> Tensor:
            return (grad(bca_contrastive_loss)(view, second) ** 2).sum()

        live = first.clone().requires_grad_()
        value = bca_contrastive_loss(live, second)
        (inner,) = torch.autograd.grad(value, live, create_graph=True)
        (expected,) = torch.autograd.grad((inner**2).sum(), live)
        close(grad(norm)(first), expected)

    def test_functional_call_of_the_head(self) -> None:
        head = MultiScaleClusterHead(4, (3, 5))
        state = {name: torch.zeros_like(p) for name, p in head.named_parameters()}
        features = random_embeddings(6, 4, 0, torch.float32)
        first, second = functional_call(head, state, (features,))
        close(first, torch.full((6, 3), 1 / 3), 1e-6)
        close(second, torch.full((6, 5), 1 / 5), 1e-6)

    def test_ensemble_of_heads(self) -> None:
        heads = [MultiScaleClusterHead(4, (3, 5)) for _ in range(3)]
        state = torch.func.stack_module_state(heads)[0]
        features = random_embeddings(6, 4, 0, torch.float32)
        outputs = vmap(lambda parameters: functional_call(heads[0], parameters, (features,)))(state)
        for index, head in enumerate(heads):
            close(outputs[1][index], head(features)[1], 1e-6)


class TestCopies:
    @over()
    @pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
    def test_a_copy_does_the_same(self, case: Case, how: str) -> None:
        module, arguments = case.build(), case.arguments()
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
        agree(evaluate(duplicate, arguments), evaluate(module, arguments), 0)

    @pytest.mark.parametrize("name", ["clusters", "objective"])
    def test_output_can_be_pickled(self, name: str) -> None:
        output = CASES[name].build()(*CASES[name].arguments())
        restored = pickle.loads(pickle.dumps(output))
        assert type(restored) is type(output)
        close(restored, output, 0)

    @over(where=lambda case: case.name in ("objective", "features", "head", "head, hidden"))
    def test_weights_only(self, case: Case) -> None:
        module, buffer = case.build(), io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        other = C2BINLoss(0.1) if case.name == "objective" else case.build()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        other.load_state_dict(state, strict=True)
        for key, value in other.state_dict().items():
            assert torch.equal(value, module.state_dict()[key])

    @over(where=lambda case: list(case.build().parameters()) != [])
    def test_a_deepcopy_shares_nothing(self, case: Case) -> None:
        module, arguments = case.build(), case.arguments()
        follower = copy.deepcopy(module)
        before = flat(follower(*arguments)).detach()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(-2.0)
        if "hidden" not in case.name or "evaluated" in case.name:
            close(flat(follower(*arguments)).detach(), before, 0)
        for own, other in zip(module.parameters(), follower.parameters(), strict=True):
            assert own.data_ptr() != other.data_ptr()
