"""Statistics beyond the batch: decayed over steps, summed over micro-batches, over ranks."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
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

from c2bin_ext import (
    BCAContrastiveLoss,
    C2BINLoss,
    ClusterEntropyRegularizer,
    MultiScaleClusterHead,
)
from c2bin_ext.functional import c2bin_loss, c2bin_statistics
from c2bin_ext.statistics import RunningStatistics

HEADS = (2, 5)
DECAY = 0.7
STEPS = (6, 3, 9)  # instances of each step's batch


def weights() -> list[float]:
    """What each step counts in the mean after the last one."""
    raw = [DECAY ** (len(STEPS) - 1 - t) for t in range(len(STEPS))]
    return [value / sum(raw) for value in raw]


def batches(k: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (random_assignments(n, k, seed=10 * t + k), random_assignments(n, k, seed=10 * t + k + 5))
        for t, n in enumerate(STEPS)
    ]


def decayed(views: list[Tensor], power: float) -> oracle.Matrix:
    """Rows whose sums (power 1) or sums of products (power 1/2) are the decayed means."""
    scaled = [w**power * view for w, view in zip(weights(), views, strict=True)]
    return rows(torch.cat(scaled))


CONTRASTS: dict[str, dict[str, Any]] = {
    "cosine": {},
    "dot": {"similarity": "dot", "temperature": 2.0},
    "printed": {"similarity": "dot", "positive_in_denominator": False, "symmetric": False},
    "one way": {"symmetric": False, "temperature": 0.2},
}


class TestRunning:
    @pytest.mark.parametrize("options", CONTRASTS.values(), ids=CONTRASTS)
    def test_contrast(self, options: dict[str, Any]) -> None:
        """Decayed Gram matrices and norms are those of all rows so far, suitably scaled."""
        loss = BCAContrastiveLoss(**options, running_decay=DECAY, num_clusters=5).double()
        steps = batches(5)
        for view0, view1 in steps[:-1]:
            loss(view0, view1)
        view0, view1 = (view.requires_grad_() for view in steps[-1])
        value = loss(view0, view1)

        first, second = (decayed([step[i].detach() for step in steps], 0.5) for i in range(2))
        assert float(value.detach()) == pytest.approx(
            oracle.contrast(first, second, **options), abs=1e-12
        )
        gradient = oracle.finite_differences(
            lambda m: oracle.contrast(m, second, **options), copy.deepcopy(first)
        )
        # By the scaled rows, so by the batch times the scale.
        own = torch.tensor(gradient, dtype=torch.float64)[-STEPS[-1] :] * weights()[-1] ** 0.5
        (found,) = torch.autograd.grad(value, view0)
        torch.testing.assert_close(found, own, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_entropy(self, reduction: str) -> None:
        loss = ClusterEntropyRegularizer(reduction, running_decay=DECAY, num_clusters=5).double()
        steps = [view0 for view0, _ in batches(5)]
        for view in steps[:-1]:
            loss(view)
        view = steps[-1].requires_grad_()
        value = loss(view)

        past = decayed([step.detach() for step in steps], 1.0)
        factor = STEPS[-1] if reduction == "sum" else 1
        expected = factor * oracle.entropy_regularizer(past)
        assert float(value.detach()) == pytest.approx(expected, abs=1e-12)
        gradient = oracle.finite_differences(oracle.entropy_regularizer, copy.deepcopy(past))
        own = factor * weights()[-1] * torch.tensor(gradient, dtype=torch.float64)[-STEPS[-1] :]
        (found,) = torch.autograd.grad(value, view)
        torch.testing.assert_close(found, own, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("options", CONTRASTS.values(), ids=CONTRASTS)
    def test_objective_is_its_terms(self, options: dict[str, Any]) -> None:
        """All heads in one buffer are as each loss with a buffer of its own."""
        whole = C2BINLoss(**options, running_decay=DECAY, num_clusters=HEADS).double()
        contrasts = [
            BCAContrastiveLoss(**options, running_decay=DECAY, num_clusters=k).double()
            for k in HEADS
        ]
        gaps = [
            [ClusterEntropyRegularizer(running_decay=DECAY, num_clusters=k).double() for k in HEADS]
            for _ in range(2)
        ]
        for t, steps in enumerate(zip(*(batches(k) for k in HEADS), strict=True)):
            heads = tuple(zip(*steps, strict=True))
            p, z = random_embeddings(STEPS[t], 4, seed=t), random_embeddings(STEPS[t], 4, seed=9)
            output = whole((p, p), (z, z), heads)
            contrast = sum(loss(*views) for loss, views in zip(contrasts, steps, strict=True))
            entropy = sum(
                loss(view) / 2
                for losses, views in zip(gaps, heads, strict=True)
                for loss, view in zip(losses, views, strict=True)
            )
            torch.testing.assert_close(output.contrast, contrast, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(output.entropy, entropy, rtol=1e-12, atol=1e-12)
            assert float(output.alignment.detach()) == pytest.approx(
                oracle.alignment(rows(p), rows(z)), abs=1e-12
            )

    def test_no_decay_is_the_plain_loss_and_has_no_buffer(self) -> None:
        loss = C2BINLoss(running_decay=0.0, num_clusters=HEADS)
        assert loss.state_dict() == {}
        assert loss.running is None

    def test_the_first_step_is_the_plain_loss(self) -> None:
        view0, view1 = batches(5)[0]
        running = BCAContrastiveLoss(running_decay=0.99, num_clusters=5).double()
        torch.testing.assert_close(running(view0, view1), BCAContrastiveLoss()(view0, view1))

    def test_evaluation_mode_looks_without_remembering(self) -> None:
        view0, view1 = batches(5)[0]
        loss = BCAContrastiveLoss(running_decay=DECAY, num_clusters=5).double()
        loss(view0, view1)
        before = copy.deepcopy(loss.state_dict())
        loss.eval()(view1, view0)
        assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_step_that_overflowed_is_not_remembered(self, bad: float) -> None:
        (view0, view1), (other0, other1), _ = batches(5)
        loss = BCAContrastiveLoss(running_decay=DECAY, num_clusters=5).double()
        loss(view0, view1)
        twin = copy.deepcopy(loss)
        broken = view0.clone()
        broken[0, 0] = bad
        assert not math.isfinite(loss(broken, view1))
        torch.testing.assert_close(loss(other0, other1), twin(other0, other1), rtol=0, atol=0)

    def test_saved_and_restored(self) -> None:
        steps = batches(5)
        loss, resumed = (
            BCAContrastiveLoss(running_decay=DECAY, num_clusters=5).double() for _ in range(2)
        )
        for view0, view1 in steps[:-1]:
            loss(view0, view1)
        file = io.BytesIO()
        torch.save(loss.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(resumed(*steps[-1]), loss(*steps[-1]))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_models_keep_full_sums(self, dtype: torch.dtype) -> None:
        model = nn.ModuleList([BCAContrastiveLoss(running_decay=DECAY, num_clusters=5)])
        view0, view1 = (view.float() for view in batches(5)[0])
        model[0](view0, view1)
        kept = model[0].running.sums.clone()
        model.to(dtype)
        assert model[0].running.sums.dtype is torch.float32
        assert torch.equal(model[0].running.sums, kept)
        assert model[0](view0.to(dtype), view1.to(dtype)).dtype is torch.float32

    def test_compiled_without_a_break(self) -> None:
        loss = C2BINLoss(running_decay=DECAY, num_clusters=HEADS)
        twin = copy.deepcopy(loss)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        for t, steps in enumerate(zip(*(batches(k) for k in HEADS), strict=True)):
            heads = tuple(
                tuple(v.float().requires_grad_() for v in view) for view in zip(*steps, strict=True)
            )
            leaves = [view for views in heads for view in views]
            p = random_embeddings(STEPS[t], 4, seed=t).float()
            first, second = (each((p, p), (p, p), heads) for each in (loss, compiled))
            torch.testing.assert_close(first.loss, second.loss)
            # Backward after the buffers have moved on: the step's own share must still be known.
            grads = [torch.autograd.grad(each.loss, leaves) for each in (first, second)]
            torch.testing.assert_close(*grads)
        torch.testing.assert_close(loss.running.sums, twin.running.sums)

    def test_no_graph_grows_over_steps(self) -> None:
        loss = BCAContrastiveLoss(running_decay=DECAY, num_clusters=5).double()
        for view0, view1 in batches(5):
            loss(view0.requires_grad_(), view1)
        assert not loss.running.sums.requires_grad

    def test_errors(self, complains: Any) -> None:
        with complains(ValueError, "num_clusters", "running_decay", "None"):
            BCAContrastiveLoss(running_decay=0.9)
        for losses in (BCAContrastiveLoss, ClusterEntropyRegularizer):
            with complains(ValueError, "running_decay", "[0, 1)", "1.0"):
                losses(running_decay=1.0, num_clusters=5)
            with complains(ValueError, "running_decay", "-0.1"):
                losses(running_decay=-0.1, num_clusters=5)
            with complains(ValueError, "num_clusters", "1"):
                losses(running_decay=0.5, num_clusters=1)
            with complains(TypeError, "num_clusters", "an int >= 2", "(3, 4)"):
                losses(running_decay=0.5, num_clusters=(3, 4))
        with complains(TypeError, "running_decay", "str"):
            C2BINLoss(running_decay="0.9", num_clusters=HEADS)  # type: ignore[arg-type]
        loss = BCAContrastiveLoss(running_decay=0.9, num_clusters=4)
        with complains(
            ValueError,
            "own: expected 24 sums, got shape (35,); running "
            "statistics were made for other numbers of clusters",
        ):
            loss(*(view.float() for view in batches(5)[0]))
        with complains(ValueError, "size", "0"):
            RunningStatistics(0, 0.5)
        assert RunningStatistics(1, 0.5).sums.shape == (1,)
        with complains(ValueError, "decay: expected", "1.5"):
            RunningStatistics(1, 1.5)
        with complains(TypeError, "decay: expected", "str"):
            RunningStatistics(1, "0.5")  # type: ignore[arg-type]

    def test_repr(self) -> None:
        text = repr(BCAContrastiveLoss(running_decay=0.9, num_clusters=4))
        assert "size=24, decay=0.9" in text
        assert "running=None" not in repr(BCAContrastiveLoss())


class Model(nn.Module):
    """Something with parameters whose gradients are compared."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 7), nn.Tanh())
        self.projector = nn.Linear(7, 4)
        self.head = MultiScaleClusterHead(7, HEADS)
        self.to(dtype)

    def forward(self, view0: Tensor, view1: Tensor) -> Any:
        features = self.encoder(view0), self.encoder(view1)
        p = tuple(self.projector(f) for f in features)
        return p, (p[1] * 2, p[0] + 1), (self.head(features[0]), self.head(features[1]))


OBJECTIVES: dict[str, dict[str, Any]] = {
    "default": {},
    "sum": {"reduction": "sum", "cluster_weight": 0.3},
    "dot": {"similarity": "dot", "temperature": 4.0},
    "paper": {
        "similarity": "dot",
        "positive_in_denominator": False,
        "symmetric": False,
        "symmetric_alignment": False,
        "reduction": "sum",
        "temperature": 8.0,
    },
}


def images(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    first = random_embeddings(n, 6, 1, dtype)
    return first, first + 0.3 * random_embeddings(n, 6, 2, dtype)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


class TestMicroBatches:
    @pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
    )
    @pytest.mark.parametrize("sizes", [(8, 8, 8), (1, 16, 7), (24,)], ids=str)
    def test_union(
        self, options: dict[str, Any], dtype: torch.dtype, tolerance: float, sizes: tuple[int, ...]
    ) -> None:
        criterion = C2BINLoss(**options)
        whole = Model(dtype)
        expected = criterion(*whole(*images(24, dtype)))
        expected.loss.backward()

        parts = list(zip(*(view.split(sizes) for view in images(24, dtype)), strict=True))
        model = Model(dtype)
        with torch.no_grad():
            total = sum(criterion.statistics(*model(*part)) for part in parts)
        for part in parts:
            output = criterion(*model(*part), statistics=total)
            for got, wanted in zip(output, expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
            output.loss.backward()
        for got, wanted in zip(gradients(model), gradients(whole), strict=True):
            torch.testing.assert_close(got, wanted, rtol=10 * tolerance, atol=tolerance)

    def test_order_and_grouping_do_not_matter(self) -> None:
        outputs = Model(torch.float64)(*images(24, torch.float64))
        whole = c2bin_statistics(*outputs)
        halves = [
            c2bin_statistics(*Model(torch.float64)(*(v[rows] for v in images(24, torch.float64))))
            for rows in (slice(9, None), slice(0, 9))
        ]
        torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-13, atol=1e-13)
        assert not whole.requires_grad

    def test_half_inputs_are_summed_in_float32(self) -> None:
        outputs = Model(torch.float32)(*images(24, torch.float32))
        half = [
            tuple(v.bfloat16() if isinstance(v, Tensor) else [h.bfloat16() for h in v] for v in o)
            for o in outputs
        ]
        assert c2bin_statistics(*half).dtype is torch.float32
        total = c2bin_statistics(*half)
        torch.testing.assert_close(
            c2bin_loss(*half, statistics=total).loss, c2bin_loss(*half).loss, rtol=1e-6, atol=1e-6
        )

    def test_errors(self, complains: Any) -> None:
        outputs = Model(torch.float32)(*images(8, torch.float32))
        total = c2bin_statistics(*outputs)
        with complains(ValueError, "statistics", f"({len(total) + 1},)", f"({len(total)},)"):
            c2bin_loss(*outputs, statistics=torch.zeros(len(total) + 1))
        with complains(
            TypeError, "statistics: expected a vector as c2bin_statistics returns, got list"
        ):
            c2bin_loss(*outputs, statistics=total.tolist())
        with complains(TypeError, "statistics", "floating-point", "torch.int64"):
            c2bin_loss(*outputs, statistics=total.long())
        with complains(ValueError, "statistics", "device cpu", "device meta"):
            c2bin_loss(*outputs, statistics=total.to("meta"))
        with complains(ValueError, "statistics", "finite", "1 NaN"):
            nan = total.index_fill(0, torch.tensor([2]), math.nan)
            c2bin_loss(*outputs, statistics=nan, validate_args=True)
        with complains(
            ValueError,
            "statistics: expected None together with running statistics, which would take in every "
            "micro-batch as a step",
        ):
            C2BINLoss(running_decay=0.5, num_clusters=HEADS)(*outputs, statistics=total)

    def test_values_are_checked_on_demand_alone(self, complains: Any) -> None:
        outputs = Model(torch.float32)(*images(8, torch.float32))
        outputs[0][0][0, 0] = math.nan
        assert c2bin_statistics(*outputs).isnan().any()
        assert C2BINLoss().statistics(*outputs).isnan().any()
        for check in (C2BINLoss(validate_args=True).statistics, checked_statistics):
            with complains(ValueError, "predictions[0]", "finite"):
                check(*outputs)


def checked_statistics(*outputs: Any) -> Tensor:
    return c2bin_statistics(*outputs, validate_args=True)


SHARDS = (5, 19)


def shard(tensors: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, ...]:
    return tuple(view.split(SHARDS)[rank] for view in tensors)


def step(model: nn.Module, losses: Callable[[], None]) -> list[Tensor]:
    """Parameters after two optimiser steps, of which the second sees what the first left."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        losses()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def train_running(model: nn.Module, views: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
    criterion = C2BINLoss(gather_distributed=True, running_decay=DECAY, num_clusters=HEADS)
    criterion.double()
    found = step(model, lambda: criterion(*model(*views)).loss.backward())
    return found, criterion.running.sums


def train_in_parts(model: nn.Module, views: tuple[Tensor, ...], size: int) -> list[Tensor]:
    criterion = C2BINLoss(gather_distributed=True)
    parts = list(zip(*(view.split(size) for view in views), strict=True))

    def losses() -> None:
        with torch.no_grad():
            total = sum(criterion.statistics(*model(*part)) for part in parts)
        for part in parts:
            criterion(*model(*part), statistics=total).loss.backward()

    return step(model, losses)


def worker(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    mine = shard(images(sum(SHARDS), torch.float64), rank)
    model = DistributedDataParallel(Model(torch.float64))
    result: dict[str, Any] = {"running": train_running(model, mine)}
    # As many micro-batches on each rank, of another size: 5 = 3 + 2 and 19 = 10 + 9.
    model = DistributedDataParallel(Model(torch.float64))
    result["parts"] = train_in_parts(model, mine, size=(SHARDS[rank] + 1) // 2)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_different_data_step_as_one_process(tmp_path: Path) -> None:
    mp.spawn(worker, args=(2, str(tmp_path)), nprocs=2)
    views = images(sum(SHARDS), torch.float64)
    running, sums = train_running(Model(torch.float64), views)
    parts = train_in_parts(Model(torch.float64), views, size=sum(SHARDS))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["running"][0], running, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["running"][1], sums, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["parts"], parts, rtol=1e-12, atol=1e-12)
