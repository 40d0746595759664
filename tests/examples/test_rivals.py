"""IIC, PICA and CC: losses against the formulas of their papers in loops, and what they train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import join
from torch import Tensor, nn

METHODS = ("iic", "pica", "cc")


def assignments(n: int = 12, k: int = 4) -> Tensor:
    # Of float64 assignments, the sums are float64.
    return torch.randn(n, k, dtype=torch.float64).softmax(dim=1)


def balance(rows: Tensor) -> float:
    share = [sum(column) / len(rows) for column in rows.T.tolist()]
    return math.log(len(share)) + sum(s * math.log(s) for s in share)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.hypot(*a) / math.hypot(*b)


def nt_xent(first: list[list[float]], second: list[list[float]], temperature: float) -> float:
    vectors, n, total = [*first, *second], len(first), 0.0
    for i, own in enumerate(vectors):
        others = {
            j: math.exp(cosine(own, v) / temperature) for j, v in enumerate(vectors) if j != i
        }
        total -= math.log(others[(i + n) % (2 * n)] / sum(others.values())) / (2 * n)
    return total


def iic_in_loops(first: Tensor, second: Tensor) -> float:
    n, k = first.shape
    joint = [[0.0] * k for _ in range(k)]
    for p, q in zip(first.tolist(), second.tolist(), strict=True):
        for i in range(k):
            for j in range(k):
                joint[i][j] += (p[i] * q[j] + p[j] * q[i]) / (2 * n)
    rows = [sum(row) for row in joint]
    return -sum(
        joint[i][j] * math.log(joint[i][j] / (rows[i] * rows[j]))
        for i in range(k)
        for j in range(k)
    )


def pica_in_loops(first: Tensor, second: Tensor) -> float:
    columns, total = (first.T.tolist(), second.T.tolist()), balance(first) + balance(second)
    for k, own in enumerate(columns[0]):
        exponentials = [math.exp(cosine(own, other)) for other in columns[1]]
        total -= math.log(exponentials[k] / sum(exponentials)) / len(columns[0])
    return total


def scan_in_loops(first: Tensor, second: Tensor) -> float:
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    alike = [math.log(sum(a * b for a, b in zip(p, q, strict=True))) for p, q in pairs]
    return 5 * balance(first) - sum(alike) / len(alike)


def cc_in_loops(first: Tensor, second: Tensor) -> float:
    return nt_xent(first.T.tolist(), second.T.tolist(), 1.0) + balance(first) + balance(second)


LOOPS = {"IIC": iic_in_loops, "PICA": pica_in_loops, "SCAN": scan_in_loops, "CC": cc_in_loops}


class TestLosses:
    @pytest.mark.parametrize("name", LOOPS)
    def test_are_the_formulas_summed_over_heads(self, name: str) -> None:
        from experiments.cluster_losses import LOSSES

        assert set(LOSSES) == set(LOOPS)
        # A head of more than 256 clusters is summed apart from the small ones.
        sizes = (3, 5, 300) if name == "IIC" else (3, 5)
        heads = [(assignments(k=k), assignments(k=k)) for k in sizes]
        expected = sum(LOOPS[name](*pair) for pair in heads)
        views = tuple(zip(*heads, strict=True))
        assert float(LOSSES[name](views)) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("name", LOOPS)
    def test_gradients_are_those_of_differences(self, name: str) -> None:
        from experiments.cluster_losses import LOSSES

        logits = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)

        def loss(logits: Tensor) -> Tensor:
            first, second, third, fourth = logits.softmax(dim=2)
            return LOSSES[name](((first, second), (third, fourth)))

        assert torch.autograd.gradcheck(loss, logits)

    @pytest.mark.parametrize("name", LOOPS)
    def test_are_finite_where_clusters_are_empty(self, name: str) -> None:
        from experiments.cluster_losses import LOSSES

        one = torch.zeros(6, 3)
        one[:, 0] = 1
        one.requires_grad_()
        loss = LOSSES[name](((one,), (one,)))
        (gradient,) = torch.autograd.grad(loss, one)
        assert loss.isfinite()
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("name", ["IIC", "PICA", "CC"])
    def test_know_the_global_batch(self, name: str, ranks: list[Any]) -> None:
        images, weight = inputs()
        loss = of_weight(name, images, weight)
        (gradient,) = torch.autograd.grad(loss, weight)
        for rank in ranks:
            torch.testing.assert_close(rank[name][0], loss.detach())
            # DDP averages the gradients of its ranks.
            torch.testing.assert_close(rank[name][1], gradient)


def inputs() -> tuple[Tensor, Tensor]:
    """Return two views (2, n, d) and the weight (ΣK, d) of two linear heads."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 10, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    return images, weight


def of_weight(name: str, images: Tensor, weight: Tensor) -> Tensor:
    from experiments.cluster_losses import LOSSES

    views = [[part.softmax(dim=1) for part in (v @ weight.T).split([3, 5], 1)] for v in images]
    return LOSSES[name]((views[0], views[1]))


def worker(rank: int, folder: str) -> None:
    join(rank, 2, folder)
    images, weight = inputs()
    own, found = images[:, (slice(3), slice(3, None))[rank]], {}
    for name in ("IIC", "PICA", "CC"):
        loss = of_weight(name, own, weight)
        (gradient,) = torch.autograd.grad(loss, weight)
        dist.all_reduce(gradient)
        found[name] = loss.detach(), gradient / 2
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def model_of(method: str) -> Any:
    from experiments.methods import KINDS, heads_by_class

    torch.manual_seed(0)
    kind, options = KINDS[method].kind, dict(KINDS[method].options)
    options["num_clusters"] = heads_by_class(method, 3)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    return kind(backbone, 8, **options)


class TestMethods:
    def test_have_the_heads_of_their_papers_and_no_follower(self) -> None:
        sizes = {method: model_of(method).cluster_head.num_clusters for method in METHODS}
        assert sizes == {"iic": (3, 21), "pica": (3, 21), "cc": (3,)}
        for method in METHODS:
            model = model_of(method)
            parts = {name.split(".")[0] for name, _ in model.method.named_parameters()}
            more = {"projector"} if method == "cc" else set()
            assert parts == {"backbone", "cluster_head"} | more

    @pytest.mark.parametrize("method", METHODS)
    def test_a_step_is_the_loss_of_both_views_and_trains_every_part(self, method: str) -> None:
        model, views = model_of(method).double(), torch.rand(2, 6, 3, 2, 2, dtype=torch.float64)
        losses = model.losses(*views)
        torch.autograd.backward(losses["loss"])
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        features = [model(view) for view in views]
        heads = [model.cluster_head(each) for each in features]
        loop = LOOPS[method.upper()]
        clusters = sum(loop(*pair) for pair in zip(*heads, strict=True))
        if method == "cc":
            first, second = (model.projector(each).tolist() for each in features)
            instances = nt_xent(first, second, 0.5)
            assert losses["instances"].item() == pytest.approx(instances, rel=1e-6)
            assert losses["clusters"].item() == pytest.approx(clusters, rel=1e-6)
            clusters += instances
        assert losses["loss"].item() == pytest.approx(clusters, rel=1e-6)

    @pytest.mark.parametrize("method", METHODS)
    def test_clusters_make_nothing_on_another_device_and_read_no_value(self, method: str) -> None:
        from experiments.rivals import ClusterMethod

        model = model_of(method).to("meta")
        features = tuple(map(model, torch.rand(2, 6, 3, 2, 2, device="meta")))
        # Without CC's NT-Xent: lightly's picks entries by a mask, which reads values.
        loss = ClusterMethod.objective(model.method, features)["loss"]
        torch.autograd.backward(loss)
        assert loss.device.type == "meta"

    def test_over_processes_only_instances_need_to_be_told(self) -> None:
        for method in METHODS:
            model = model_of(method)
            model.method.span_processes(2)
            assert method != "cc" or model.criterion.gather_distributed

    def test_their_heads_are_scored_as_they_are(self) -> None:
        from experiments.training import own_heads

        model, features = model_of("cc").train(), 3 + torch.randn(9, 8)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        (found,) = own_heads(model, features)
        assert model.cluster_head.hidden.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        (expected,) = model.cluster_head.eval()(features)
        assert torch.equal(found, expected.detach())
        assert not found.requires_grad
        from experiments.methods import KINDS

        simclr = KINDS["simclr"].kind(nn.Flatten(), 12)
        assert own_heads(simclr, features) == []

    def test_find_clusters_that_are_there(self) -> None:
        from experiments.training import own_heads

        from c2bin_ext.metrics import clustering_accuracy

        for method in METHODS:
            model, source = model_of(method), torch.Generator().manual_seed(0)
            centres = 2 * torch.randn(3, 3, 2, 2, generator=source)
            labels = torch.arange(60) % 3
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            for _ in range(100):
                noise = torch.randn(2, 60, 3, 2, 2, generator=source)
                optimizer.zero_grad()
                torch.autograd.backward(model.losses(*(centres[labels] + noise / 2))["loss"])
                optimizer.step()
            found = own_heads(model, model(centres[labels]).detach())[0].argmax(dim=1)
            assert clustering_accuracy(labels, found) == 1.0, method


def test_simclr_with_clusters_trains_the_sum_of_both() -> None:
    from experiments.methods import KINDS

    kind, options = KINDS["clustered"].kind, dict(KINDS["clustered"].options)
    options |= {"num_clusters": [3, 5], "cluster_weight": 0.25, "temperature": 0.2}
    model = kind(nn.Sequential(nn.Flatten(), nn.Linear(12, 8)), 8, **options).double()
    views = torch.rand(2, 6, 3, 2, 2, dtype=torch.float64)
    losses = model.losses(*views)
    torch.autograd.backward(losses["loss"])
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    features = [model(view) for view in views]
    first_heads, heads = ([oracle.rows(p) for p in model.cluster_head(f)] for f in features)
    clusters = oracle.multi_scale((first_heads, heads))[0]
    first, second = (model.projector(each).tolist() for each in features)
    instances = nt_xent(first, second, 0.2)
    assert losses["loss"].item() == pytest.approx(instances + 0.25 * clusters, rel=1e-6)


def test_a_bench_sizes_heads_by_its_classes(tmp_path: Path) -> None:
    from experiments import demo
    from experiments.methods import model_of
    from experiments.runs import Bench, Trial

    args = demo.parse(["--smoke", "--out", str(tmp_path)])
    bench = Bench(args, 1)
    for method, heads in {"iic": [10, 70], "pica": [10, 70], "cc": [10]}.items():
        (job,) = bench.jobs(Trial(method), 1, [0])
        assert job.settings["options"]["num_clusters"] == heads
        model: Any = model_of(job.settings)
        assert list(model.cluster_head.num_clusters) == heads
        assert model.optimization["optimizer"] == "sgd"
