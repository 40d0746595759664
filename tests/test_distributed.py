"""Losses of the global batch: two and three gloo processes against one.

Each group of processes is started once and runs every form on different data and uneven shards;
the tests then compare what the ranks wrote with one process that holds the concatenated batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import (
    CASES,
    HEADS,
    Case,
    close,
    evaluate,
    over,
    random_embeddings,
)
from helpers import Collectives
from ranks import join
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map

from c2bin_ext import C2BINObjective

N = 24
SHARDS = {2: (5, 19), 3: (1, 16, 7)}
ROWS = [case for case in CASES.values() if "ranks" not in case.refuses]
rows_over_ranks = over(cases=ROWS)
# Rows whose configuration a training step through DDP is taken with.
STEPS: dict[str, dict[str, Any]] = {
    "default": {},
    "sum": {"reduction": "sum", "cluster_weight": 0.3},
    "dot": {"similarity": "dot", "temperature": 2.0, "positive_in_denominator": False},
}


def shard(case: Case, tree: Any, world: int, rank: int) -> Any:
    sizes = SHARDS[world]
    if case.micro and min(sizes) == 1:
        sizes = (2, *sizes[1:-1], sizes[-1] - 1)
    start = sum(sizes[:rank])
    return tree_map(lambda t: t[start : start + sizes[rank]].clone(), tree)


def count(case: Case, arguments: Any, gather: bool) -> tuple[list[str], int]:
    module = case.build(gather_distributed=gather)
    with Collectives() as collectives:
        evaluate(module, arguments)
    return collectives.calls, collectives.numbers


class Training(nn.Module):
    """A network under the whole objective: what DDP wraps, with the loss inside."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.projector, self.predictor = nn.Linear(8, 4), nn.Linear(4, 4)
        self.objective = C2BINObjective(8, HEADS, **options)
        follower = [self.backbone, self.projector]
        self.follower = copy.deepcopy(nn.ModuleList(follower)).requires_grad_(False)
        self.double()

    def outputs(self, *images: Tensor) -> tuple[Any, ...]:
        features = tuple(map(self.backbone, images))
        fixed = tuple(self.follower[0](x + 0.1) for x in images)
        predictions = tuple(self.predictor(self.projector(f)) for f in features)
        return predictions, tuple(map(self.follower[1], fixed)), features, fixed

    def forward(self, *images: Tensor, statistics: Tensor | None = None) -> Tensor:
        return self.objective(*self.outputs(*images), statistics=statistics).loss


def images() -> tuple[Tensor, Tensor]:
    first = random_embeddings(N, 6, 1)
    return first, first + 0.3 * random_embeddings(N, 6, 2)


def take_steps(
    views: tuple[Tensor, ...], gather: bool, parts: int, **options: Any
) -> dict[str, Tensor]:
    """Parameters after two SGD steps of some micro-batches, through DDP if there are ranks."""
    training = Training(gather_distributed=gather, **options)
    model = DistributedDataParallel(training) if gather else training
    optimizer = torch.optim.SGD(training.parameters(), lr=0.1, momentum=0.9)
    size = -(-len(views[0]) // parts)
    batches = list(zip(*(view.split(size) for view in views), strict=True))
    for _ in range(2):
        optimizer.zero_grad()
        total = None
        if parts > 1:
            with torch.no_grad():
                total = sum(
                    training.objective.statistics(*training.outputs(*batch)) for batch in batches
                )
        for batch in batches:
            model(*batch, statistics=total).backward()
        optimizer.step()
    return {key: value.clone() for key, value in training.state_dict().items()}


def worker(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    result: dict[str, Any] = {}
    for case in ROWS:
        mine = shard(case, case.arguments(N), world, rank)
        single = tree_map(Tensor.float, mine)
        half = tree_map(Tensor.bfloat16, mine)
        gathering = case.build(gather_distributed=True)
        result[case.name] = {
            "global": evaluate(gathering, mine),
            "local": evaluate(case.build(), mine),
            "counted": count(case, mine, True),
            "counted locally": count(case, mine, False),
            "single": evaluate(gathering.float(), single),
            "half": evaluate(gathering, half),
        }
    views = tuple(shard(CASES["objective"], view, world, rank) for view in images())
    result["steps"] = {
        name: take_steps(views, True, 1, **options) for name, options in STEPS.items()
    }
    if min(SHARDS[world]) > 1:
        # As many micro-batches on each rank, of other sizes: 5 = 3 + 2 and 19 = 10 + 9.
        result["micro-batches"] = take_steps(views, True, 2)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=sorted(SHARDS), ids=lambda world: f"{world}-ranks")
def ranks(request: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What every rank found; its length is the world size."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"ranks{world}")
    mp.spawn(worker, args=(world, str(folder)), nprocs=world, join=True)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]


def compare(case: Case, ranks: list[Any], how: str, dtype: torch.dtype, tolerance: float) -> None:
    """Values on every rank, and gradients averaged as DDP averages them, are the whole batch's."""
    arguments = tree_map(lambda t: t.to(dtype), case.arguments(N))
    if how == "half":
        arguments = tree_map(lambda t: t.bfloat16().float(), arguments)
    values, expected = evaluate(case.build().to(dtype), arguments)
    found = [result[case.name][how] for result in ranks]
    inputs = len(tree_flatten(arguments)[0])
    for value, _ in found:
        close(value, values, tolerance)
    for position, wanted in enumerate(expected):
        shares = [gradients[position] for _, gradients in found]
        join_ranks = torch.cat if position < inputs else sum
        averaged = join_ranks(shares) / len(ranks)
        if averaged.dtype is torch.bfloat16:
            continue
        close(averaged, wanted, tolerance)


class TestRanks:
    @rows_over_ranks
    def test_loss_and_gradients_of_the_global_batch(self, case: Case, ranks: Any) -> None:
        compare(case, ranks, "global", torch.float64, 1e-11)

    @rows_over_ranks
    def test_float32(self, case: Case, ranks: Any) -> None:
        compare(case, ranks, "single", torch.float32, 2e-4 if "small" in case.name else 5e-5)

    @rows_over_ranks
    def test_bfloat16_inputs_are_summed_in_float32(self, case: Case, ranks: Any) -> None:
        compare(case, ranks, "half", torch.float32, 2e-4 if "small" in case.name else 5e-5)

    @rows_over_ranks
    def test_no_communication_without_gathering(self, case: Case, ranks: Any) -> None:
        for rank, result in enumerate(ranks):
            assert result[case.name]["counted locally"] == ([], 0)
            own = shard(case, case.arguments(N), len(ranks), rank)
            values, gradients = evaluate(case.build(), own)
            close(result[case.name]["local"][0], values, 1e-13)
            close(result[case.name]["local"][1], gradients, 1e-13)

    @rows_over_ranks
    def test_one_collective_of_order_k_squared(self, case: Case, ranks: Any) -> None:
        pairs = 2 if "follower" in case.name else 1
        for result in ranks:
            calls, numbers = result[case.name]["counted"]
            assert len(calls) == case.collectives, calls
            assert all("allreduce" in call or "all_reduce" in call for call in calls)
            assert numbers <= case.collectives * (pairs * sum(k * k + 4 * k for k in HEADS) + 8)

    @over(cases=[CASES[name] for name in ("contrast", "entropy mean", "clusters", "objective")])
    def test_global_loss_is_not_the_mean_of_local_losses(self, case: Case, ranks: Any) -> None:
        local = torch.stack([result[case.name]["local"][0][0] for result in ranks])
        assert (local.mean() - ranks[0][case.name]["global"][0][0]).abs() > 1e-4


class TestSteps:
    @pytest.mark.parametrize("name", STEPS)
    def test_parameters_after_ddp_steps(self, name: str, ranks: Any) -> None:
        expected = take_steps(images(), False, 1, **STEPS[name])
        for result in ranks:
            close(result["steps"][name], expected, 1e-10)

    def test_parameters_after_ddp_steps_in_micro_batches(self, ranks: Any) -> None:
        expected = take_steps(images(), False, 1)
        for result in ranks:
            if "micro-batches" in result:
                close(result["micro-batches"], expected, 1e-10)
        assert any("micro-batches" in result for result in ranks) == (len(ranks) == 2)

    def test_steps_move_every_parameter(self) -> None:
        before, after = Training().state_dict(), take_steps(images(), False, 1)
        for key, value in before.items():
            assert ((after[key] - value).abs().max() > 1e-6) == ("follower" not in key), key


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def gathering_changes_nothing(case: Case) -> None:
    arguments = tree_map(Tensor.float, case.arguments(7))
    gathered, plain = (
        evaluate(case.build(gather_distributed=gather).float(), arguments)
        for gather in (True, False)
    )
    close(gathered, plain, 0)
    assert count(case, case.arguments(7), True) == ([], 0)


class TestOneProcess:
    @over("ranks")
    def test_not_initialised(self, case: Case) -> None:
        assert not dist.is_initialized()
        gathering_changes_nothing(case)

    @over("ranks")
    def test_world_of_one(self, case: Case, one_rank: None) -> None:
        assert dist.get_world_size() == 1
        gathering_changes_nothing(case)

    def test_the_count_sees_a_collective(self, one_rank: None) -> None:
        with Collectives() as collectives:
            dist.all_reduce(torch.ones(3))
        assert len(collectives.calls) == 1
        assert collectives.numbers == 3
