"""What a GPU needs: no value is read, which would wait for it, and no tensor is made elsewhere.

Tensors on the device `meta` have no values, so whatever reads one raises; and they do not mix with
tensors of another device. On a machine with a GPU the same steps are also captured as a CUDA graph.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import CASES, Case, evaluate, flat, leaves, over, scalar
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

DTYPES = [torch.float16, torch.float32, torch.float64]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"
)


@over()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_reads_no_value(case: Case, dtype: torch.dtype) -> None:
    module = case.build().to("meta", dtype)
    values, gradients = evaluate(module, tree_map(lambda t: t.to("meta"), case.arguments(6, dtype)))
    assert values.device.type == "meta"
    assert values.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert {gradient.device.type for gradient in gradients} == {"meta"}


@over(where=lambda case: not case.name.startswith("head"))
def test_a_step_over_ranks_reads_no_value(case: Case) -> None:
    module = case.build(gather_distributed=True).to("meta")
    values, _ = evaluate(module, tree_map(lambda t: t.to("meta"), case.arguments()))
    assert values.device.type == "meta"


@over("validation", where=lambda case: case.inputs is not CASES["alignment"].inputs)
def test_reading_a_value_would_be_seen(case: Case) -> None:
    module = case.build(validate_args=True).to("meta")
    arguments = tree_map(lambda t: t.to("meta"), case.arguments())
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        module(*arguments)


@over()
def test_no_data_dependent_access(case: Case) -> None:
    module, arguments = case.build(), case.arguments()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes, inputs = leaves(tree_map(mode.from_tensor, arguments))
        value = scalar(module(*fakes))
        value.backward()
    assert value.shape == ()
    assert value.dtype is torch.float64
    assert inputs[0].grad is not None
    assert inputs[0].grad.shape == tree_flatten(arguments)[0][0].shape


@needs_gpu
@over()
def test_a_step_is_captured_as_a_cuda_graph(case: Case) -> None:
    module = case.build().float().cuda()
    static, inputs = leaves(tree_map(lambda t: t.float().cuda(), case.arguments(64)))
    fresh = tree_map(lambda t: t.float().cuda(), case.arguments(64, seed=1000))
    inputs += module.parameters()
    state = {name: value.clone() for name, value in module.state_dict().items()}

    def step() -> tuple[Any, Any]:
        output = module(*static)
        return flat(output), torch.autograd.grad(scalar(output), inputs, allow_unused=True)

    # One stream for warm-up and capture: gradients that change streams are warned of.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        values, gradients = step()
    module.load_state_dict(state)
    with torch.no_grad():
        for place, new in zip(tree_flatten(static)[0], tree_flatten(fresh)[0], strict=True):
            place.copy_(new)
    graph.replay()
    module.load_state_dict(state)
    with torch.cuda.stream(stream):
        expected, expected_gradients = evaluate(module, fresh)
    torch.testing.assert_close(values.detach(), expected)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(torch.zeros_like(wanted) if found is None else found, wanted)


@needs_gpu
@over()
def test_a_step_never_waits_for_the_gpu(case: Case) -> None:
    module = case.build().float().cuda()
    arguments = tree_map(lambda t: t.float().cuda(), case.arguments(64))
    evaluate(module, arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is a prototype, and says so
            torch.cuda.set_sync_debug_mode("error")
        evaluate(module, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
