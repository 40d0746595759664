"""Losses of the global batch: two and three gloo processes against one.

Each group of processes is started once and runs every scenario on different data and
uneven shards; the tests then compare what the ranks wrote with one process that holds
the concatenated batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import random_assignments, random_embeddings, rows
from ranks import join
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from c2bin_ext import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    ClusterEntropyRegularizer,
    MultiScaleClusterHead,
)

SHARDS = {2: (5, 19), 3: (1, 16, 7)}
HEADS = (2, 5, 3)
CONTRASTS: dict[str, dict[str, Any]] = {
    f"bca-{similarity}-{kept}-{symmetric}": {
        "similarity": similarity,
        "positive_in_denominator": kept == "kept",
        "symmetric": symmetric == "symmetric",
        "temperature": 0.3,
    }
    for similarity in ("cosine", "dot")
    for kept in ("kept", "left")
    for symmetric in ("symmetric", "directed")
}
ENTROPIES: dict[str, dict[str, Any]] = {
    f"entropy-{reduction}": {"reduction": reduction} for reduction in ("mean", "sum")
}
PAPER: dict[str, Any] = {
    "similarity": "dot",
    "positive_in_denominator": False,
    "symmetric": False,
    "symmetric_alignment": False,
    "reduction": "sum",
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "c2bin": {},
    "c2bin-sum": {"reduction": "sum", "cluster_weight": 0.3},
    "c2bin-dot": {"similarity": "dot", "entropy_weight": 0.5},
    "c2bin-dot-sum": {"similarity": "dot", "reduction": "sum", "temperature": 2.0},
    "c2bin-one-alignment": {"symmetric_alignment": False},
    "c2bin-paper": {**PAPER, "temperature": 2.0},
}
ALIGNMENTS: dict[str, dict[str, Any]] = {"alignment": {}}
SCENARIOS = {**CONTRASTS, **ENTROPIES, **ALIGNMENTS, **OBJECTIVES}
STEPS = [
    "bca-cosine-kept-symmetric",
    "bca-dot-left-directed",
    "entropy-mean",
    "entropy-sum",
    *OBJECTIVES,
]


def loss_of(name: str, gather: bool) -> nn.Module:
    kind = {
        "alignment": BootstrapAlignmentLoss,
        "bca": BCAContrastiveLoss,
        "entropy": ClusterEntropyRegularizer,
        "c2bin": C2BINLoss,
    }[name.split("-")[0]]
    return kind(**SCENARIOS[name], gather_distributed=gather)


def batch(n: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The global batch: embeddings and assignments of both views."""
    tensors = {
        f"{what}{v}": random_embeddings(n, 4, 10 * v + i, dtype)
        for v in (0, 1)
        for i, what in enumerate("pz")
    }
    for view in (0, 1):
        for position, k in enumerate(HEADS):
            seed = 100 + 10 * view + position
            tensors[f"a{view}{position}"] = random_assignments(n, k, seed, dtype)
    return tensors


def shard(tensors: dict[str, Tensor], sizes: tuple[int, ...], rank: int) -> dict[str, Tensor]:
    start = sum(sizes[:rank])
    return {name: t[start : start + sizes[rank]].clone() for name, t in tensors.items()}


def arguments(name: str, t: dict[str, Tensor]) -> tuple[Any, ...]:
    if name.startswith("bca"):
        return t["a01"], t["a11"]
    if name.startswith("entropy"):
        return (t["a01"],)
    if name.startswith("alignment"):
        return t["p0"], t["z1"]
    heads = tuple(tuple(t[f"a{v}{i}"] for i in range(len(HEADS))) for v in (0, 1))
    return (t["p0"], t["p1"]), (t["z0"], t["z1"]), heads


def evaluate(name: str, tensors: dict[str, Tensor], gather: bool) -> dict[str, Any]:
    """Every number the loss returns and the gradient of every tensor it was given."""
    live = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    output = loss_of(name, gather)(*arguments(name, live))
    parts = list(output) if isinstance(output, tuple) else [output]
    parts[0].backward()
    gradients = {k: t.grad for k, t in live.items() if t.grad is not None}
    return {"parts": [part.detach() for part in parts], "gradients": gradients}


class Collectives(TorchDispatchMode):
    """Counts the collectives, however they are spelled, and the numbers they carry."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace = func.namespace
        if "c10d" in namespace and "wait" not in func.__name__:
            self.calls.append(func.__name__)
            carried = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.numbers += sum(t.numel() for t in carried if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


class Runner(nn.Module):
    """Backbone, projector, predictor and heads; only what a loss uses takes part."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = None
        self.projector = self.predictor = None
        if name.startswith("c2bin"):
            self.projector, self.predictor = nn.Linear(8, 4), nn.Linear(4, 4)
            self.head = MultiScaleClusterHead(8, HEADS)
        else:
            self.head = MultiScaleClusterHead(8, HEADS[1:2])

    def project(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))

    def forward(self, x0: Tensor, x1: Tensor) -> dict[str, Tensor]:
        result = {}
        for view, x in enumerate((x0, x1)):
            features = self.backbone(x)
            first = 0 if self.predictor is not None else 1
            for position, assignment in enumerate(self.head(features), start=first):
                result[f"a{view}{position}"] = assignment
            if self.predictor is not None:
                result[f"p{view}"] = self.predictor(self.projector(features))
        return result


def take_a_step(
    name: str, images: tuple[Tensor, Tensor], gather: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Parameters after two SGD steps, through DDP where there is a process group."""
    torch.manual_seed(0)
    runner = Runner(name).to(dtype)
    follower = copy.deepcopy(runner)
    with torch.no_grad():
        for parameter in follower.parameters():
            parameter.mul_(1.1)
    model = DistributedDataParallel(runner) if gather else runner
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = loss_of(name, gather)
    for _ in range(2):
        tensors = model(*images)
        if follower.projector is not None:
            with torch.no_grad():
                targets = [follower.project(image) for image in images]
            tensors |= {"z0": targets[0], "z1": targets[1]}
        output = loss(*arguments(name, tensors))
        optimizer.zero_grad()
        (output[0] if isinstance(output, tuple) else output).backward()
        optimizer.step()
    return {key: value.clone() for key, value in runner.state_dict().items()}


def images_of(n: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    first = random_embeddings(n, 6, 1, dtype)
    return {"x0": first, "x1": first + 0.3 * random_embeddings(n, 6, 2, dtype)}


def count(name: str, tensors: dict[str, Tensor], gather: bool) -> tuple[list[str], int]:
    with Collectives() as collectives:
        evaluate(name, tensors, gather)
    return collectives.calls, collectives.numbers


def worker(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    sizes = SHARDS[world]
    mine = shard(batch(sum(sizes)), sizes, rank)
    halves = {key: tensor.to(torch.bfloat16) for key, tensor in mine.items()}
    single = {key: tensor.float() for key, tensor in mine.items()}
    images = shard(images_of(sum(sizes)), sizes, rank)
    pair = (images["x0"], images["x1"])
    result: dict[str, Any] = {
        "global": {name: evaluate(name, mine, True) for name in SCENARIOS},
        "local": {name: evaluate(name, mine, False) for name in SCENARIOS},
        "single": {name: evaluate(name, single, True) for name in OBJECTIVES},
        "half": {name: evaluate(name, halves, True) for name in OBJECTIVES},
        "counted": {name: count(name, mine, True) for name in SCENARIOS},
        "counted-local": {name: count(name, mine, False) for name in SCENARIOS},
        "spelled": spelled(mine),
        "step": {name: take_a_step(name, pair, True, torch.float64) for name in STEPS},
        "step-single": take_a_step(
            "c2bin", tuple(view.float() for view in pair), True, torch.float32
        ),
    }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spelled(tensors: dict[str, Tensor]) -> int:
    """How often one forward and backward of C2BINLoss calls dist.all_reduce itself."""
    calls, original = [], dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    dist.all_reduce = counting
    try:
        evaluate("c2bin", tensors, True)
    finally:
        dist.all_reduce = original
    return len(calls)


@pytest.fixture(scope="module", params=sorted(SHARDS), ids=lambda world: f"{world}-ranks")
def ranks(request: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What every rank found; its length is the world size."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"ranks{world}")
    mp.spawn(worker, args=(world, str(folder)), nprocs=world, join=True)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def whole(ranks: list[Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {k: t.to(dtype) for k, t in batch(sum(SHARDS[len(ranks)])).items()}


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SCENARIOS)
class TestRanks:
    def test_loss_of_the_global_batch_on_every_rank(self, name: str, ranks: Any) -> None:
        expected = evaluate(name, whole(ranks), False)["parts"]
        for result in ranks:
            for got, wanted in zip(result["global"][name]["parts"], expected, strict=True):
                close(got, wanted, 1e-12)

    def test_gradients_average_to_the_global_one(self, name: str, ranks: Any) -> None:
        expected = evaluate(name, whole(ranks), False)["gradients"]
        found = [result["global"][name]["gradients"] for result in ranks]
        assert all(set(gradients) == set(expected) for gradients in found)
        for key, wanted in expected.items():
            averaged = torch.cat([gradients[key] for gradients in found]) / len(ranks)
            close(averaged, wanted, 1e-12)

    def test_no_communication_without_gathering(self, name: str, ranks: Any) -> None:
        sizes = SHARDS[len(ranks)]
        for rank, result in enumerate(ranks):
            assert result["counted-local"][name] == ([], 0)
            expected = evaluate(name, shard(whole(ranks), sizes, rank), False)
            for got, wanted in zip(result["local"][name]["parts"], expected["parts"], strict=True):
                close(got, wanted, 1e-13)
            for key, wanted in expected["gradients"].items():
                close(result["local"][name]["gradients"][key], wanted, 1e-13)

    def test_one_collective_of_order_k_squared(self, name: str, ranks: Any) -> None:
        heads = HEADS if name.startswith("c2bin") else HEADS[1:2]
        for result in ranks:
            calls, numbers = result["counted"][name]
            assert len(calls) == 1, calls
            assert "allreduce" in calls[0] or "all_reduce" in calls[0]
            assert numbers <= sum(k * k + 4 * k for k in heads) + 8


@pytest.mark.parametrize("name", OBJECTIVES)
class TestObjectivePrecision:
    def test_float32(self, name: str, ranks: Any) -> None:
        expected = evaluate(name, whole(ranks, torch.float32), False)
        for result in ranks:
            for got, wanted in zip(result["single"][name]["parts"], expected["parts"], strict=True):
                assert got.dtype is torch.float32
                close(got, wanted, 1e-5)
        for key, wanted in expected["gradients"].items():
            found = [result["single"][name]["gradients"][key] for result in ranks]
            close(torch.cat(found) / len(ranks), wanted, 1e-5)

    def test_bfloat16_inputs_are_summed_in_float32(self, name: str, ranks: Any) -> None:
        inputs = {k: t.to(torch.bfloat16).float() for k, t in whole(ranks).items()}
        expected = evaluate(name, inputs, False)["parts"]
        for result in ranks:
            for got, wanted in zip(result["half"][name]["parts"], expected, strict=True):
                assert got.dtype is torch.float32
                close(got, wanted, 1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_parameters_after_ddp_steps(name: str, ranks: Any) -> None:
    images = images_of(sum(SHARDS[len(ranks)]))
    expected = take_a_step(name, (images["x0"], images["x1"]), False, torch.float64)
    start = Runner(name).state_dict()
    assert set(expected) == set(start)
    for result in ranks:
        for key, wanted in expected.items():
            close(result["step"][name][key], wanted, 1e-10)


def test_steps_move_every_parameter() -> None:
    images = images_of(24)
    torch.manual_seed(0)
    before = Runner("c2bin").double().state_dict()
    after = take_a_step("c2bin", (images["x0"], images["x1"]), False, torch.float64)
    for key, value in before.items():
        assert (after[key] - value).abs().max() > 1e-6, key


def test_parameters_after_ddp_steps_in_float32(ranks: Any) -> None:
    images = images_of(sum(SHARDS[len(ranks)]))
    pair = (images["x0"].float(), images["x1"].float())
    expected = take_a_step("c2bin", pair, False, torch.float32)
    for result in ranks:
        for key, wanted in expected.items():
            close(result["step-single"][key], wanted, 1e-5)


def test_one_call_of_all_reduce(ranks: Any) -> None:
    assert [result["spelled"] for result in ranks] == [1] * len(ranks)


def test_global_loss_is_not_the_mean_of_local_losses(ranks: Any) -> None:
    for name in ("bca-cosine-kept-symmetric", "entropy-mean", "c2bin"):
        local = torch.stack([result["local"][name]["parts"][0] for result in ranks])
        assert (local.mean() - ranks[0]["global"][name]["parts"][0]).abs() > 1e-4


def test_global_objective_against_the_oracle(ranks: Any) -> None:
    predictions, targets, assignments = arguments("c2bin", whole(ranks))
    for name, options in OBJECTIVES.items():
        expected = oracle.total(
            [rows(view) for view in predictions],
            [rows(view) for view in targets],
            [[rows(head) for head in view] for view in assignments],
            **options,
        )
        for got, wanted in zip(ranks[-1]["global"][name]["parts"], expected, strict=True):
            close(got, torch.tensor(wanted, dtype=torch.float64), 1e-12)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def gathering_changes_nothing(name: str) -> None:
    tensors = batch(7, torch.float32)
    gathered, plain = (evaluate(name, tensors, gather) for gather in (True, False))
    for got, wanted in zip(gathered["parts"], plain["parts"], strict=True):
        assert torch.equal(got, wanted)
    assert set(gathered["gradients"]) == set(plain["gradients"])
    for key, wanted in plain["gradients"].items():
        assert torch.equal(gathered["gradients"][key], wanted)
    assert count(name, tensors, True) == ([], 0)


@pytest.mark.parametrize("name", SCENARIOS)
class TestAlone:
    def test_not_initialised(self, name: str) -> None:
        assert not dist.is_initialized()
        gathering_changes_nothing(name)

    def test_world_of_one(self, name: str, one_rank: None) -> None:
        assert dist.get_world_size() == 1
        gathering_changes_nothing(name)


def test_the_count_sees_a_collective(one_rank: None) -> None:
    with Collectives() as collectives:
        dist.all_reduce(torch.ones(3))
    assert len(collectives.calls) == 1
    assert collectives.numbers == 3
