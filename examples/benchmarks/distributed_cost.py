"""What the exact global loss costs over processes: sums over ranks against gathered assignments.

    python examples/benchmarks/distributed_cost.py [--out docs/results]

First measured: 1, 2 and 4 gloo processes on this machine, forward and backward of the cluster terms
on 256 images each, with `gather_distributed=True` (one all-reduce of sums) and with the usual
alternative, gathering both views' assignments from all ranks and all-reducing their gradient, which
must give the same loss. Then computed for 8 to 1024 GPUs: bytes that each GPU sends, and seconds by
a stated model of the network.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hardware import processor
from torch import Tensor

from c2bin_ext.functional import multi_scale_cluster_loss
from c2bin_ext.statistics import BatchStatistics

HEADS = (32, 64, 128)
LARGE = (512, 1024, 2048)
IMAGES = 256  # of one view, on each rank
WORLDS = (1, 2, 4)
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
Heads = tuple[Tensor, ...]


class Traffic:
    """Counts calls and bytes of the collectives while it is active."""

    def __enter__(self) -> Traffic:
        self.calls: list[str] = []
        self.sent = 0
        self._all_reduce, self._all_gather = dist.all_reduce, dist.all_gather
        world = dist.get_world_size()

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls.append("all-reduce")
            self.sent += int(ring_all_reduce(tensor.numel() * tensor.element_size(), world))
            return self._all_reduce(tensor, *args, **kwargs)

        def all_gather(tensors: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls.append("all-gather")
            self.sent += int(ring_all_gather(tensor.numel() * tensor.element_size(), world))
            return self._all_gather(tensors, tensor, *args, **kwargs)

        dist.all_reduce, dist.all_gather = all_reduce, cast(Any, all_gather)
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_reduce, dist.all_gather = self._all_reduce, self._all_gather


def ring_all_reduce(size: float, world: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of `size` bytes."""
    return 2 * (world - 1) / world * size


def ring_all_gather(size: float, world: int) -> float:
    """Bytes that each rank sends in a ring all-gather of `size` bytes from each rank."""
    return (world - 1) * size


class Gather(torch.autograd.Function):
    """Rows of all ranks; the gradient of own rows is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def by_sums(view0: Heads, view1: Heads) -> Tensor:
    return multi_scale_cluster_loss((view0, view1), gather_distributed=True).loss


def by_gathering(view0: Heads, view1: Heads) -> Tensor:
    """Both views' heads side by side in one gather, then the loss of the whole on every rank."""
    rows = Gather.apply(torch.cat([*view0, *view1], dim=1))
    heads = rows.split([*HEADS, *HEADS], dim=1)
    return multi_scale_cluster_loss((heads[: len(HEADS)], heads[len(HEADS) :])).loss


def worker(rank: int, world: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    generator = torch.Generator().manual_seed(rank)
    views = [
        tuple(torch.randn(IMAGES, k, generator=generator).requires_grad_() for k in HEADS)
        for _ in range(2)
    ]

    def step(loss: Callable[[Heads, Heads], Tensor]) -> float:
        value = loss(*(tuple(head.softmax(1) for head in view) for view in views))
        value.backward()
        return float(value.detach())

    found: dict[str, Any] = {}
    for name, loss in (("sums", by_sums), ("gathered", by_gathering)):
        with Traffic() as traffic:
            value = step(loss)
        found[name] = {"loss": value, "collectives": len(traffic.calls), "sent": traffic.sent}
    seconds: dict[str, list[float]] = {"sums": [], "gathered": []}
    for index in range(rounds + 2):
        for name, loss in (("sums", by_sums), ("gathered", by_gathering)):
            dist.barrier()
            start = time.perf_counter()
            step(loss)
            if index >= 2:
                seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        found[name]["ms"] = 1e3 * statistics.median(values)
    ratios = [g / s for s, g in zip(seconds["sums"], seconds["gathered"], strict=True)]
    found["gathered"]["ratio"] = statistics.median(ratios)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(world: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(world, folder, rounds), nprocs=world)
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    if abs(found["sums"]["loss"] - found["gathered"]["loss"]) > 1e-4:
        raise RuntimeError(f"the two losses differ: {found}")
    return found


def bytes_of_sums(heads: tuple[int, ...]) -> int:
    """What `BatchStatistics` of these heads has to send."""
    view = [torch.empty(1, clusters, device="meta") for clusters in heads]
    return BatchStatistics.of(views=[view, view], contrast="cosine").flat().nbytes


def computed(
    heads: tuple[int, ...], bandwidth: float, latency: float
) -> list[dict[str, float | int]]:
    """Bytes sent and seconds by `bytes / bandwidth + latency × steps of the ring`."""
    rows = []
    rowsize = 4 * 2 * IMAGES * sum(heads)
    for world in GPUS:
        sums = ring_all_reduce(bytes_of_sums(heads), world)
        # Forward an all-gather of assignments, backward an all-reduce of the gradient of all rows.
        gathered = ring_all_gather(rowsize, world) + ring_all_reduce(rowsize * world, world)
        rows.append(
            {
                "gpus": world,
                "batch": world * IMAGES,
                "sums_mib": sums / 2**20,
                "gathered_mib": gathered / 2**20,
                "sums_ms": 1e3 * (sums / bandwidth + 2 * (world - 1) * latency),
                "gathered_ms": 1e3 * (gathered / bandwidth + 3 * (world - 1) * latency),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=WORLDS)
    parser.add_argument("--gigabytes", type=float, default=25.0, help="a second, from each GPU")
    parser.add_argument("--latency", type=float, default=5.0, help="microseconds a ring step")
    parser.add_argument("--out", type=Path, help="write distributed_cost.json and .md here")
    args = parser.parse_args()

    settings = {
        "command": "python examples/benchmarks/distributed_cost.py",
        "torch": torch.__version__,
        "device": processor(torch.device("cpu")),
        "threads of each process": 1,
        "images of each rank": IMAGES,
        "K": HEADS,
        "rounds": args.rounds,
        "model": f"{args.gigabytes:g} GB/s a GPU, {args.latency:g} µs a ring step",
    }
    lines = [
        "| processes | form | collectives a step | sent by each, KiB | ms a step | against sums |",
        "| ---: | --- " + "| ---: " * 4 + "|",
    ]
    results: dict[str, Any] = {"measured": {}, "computed": {}}
    for world in args.processes:
        found = measured(world, args.rounds)
        results["measured"][world] = found
        for name, what in (("sums", "sums"), ("gathered", "gathered assignments")):
            part = found[name]
            lines.append(
                f"| {world} | {what} | {part['collectives']} | {part['sent'] / 1024:.0f} "
                f"| {part['ms']:.2f} | {part.get('ratio', 1.0):.2f} |"
            )
    lines += [
        "",
        "| GPUs | global batch | K | sums: MiB sent, ms | gathered: MiB sent, ms |",
        "| ---: | ---: | --- | ---: | ---: |",
    ]
    for heads in (HEADS, LARGE):
        results["computed"][str(heads)] = computed(heads, 1e9 * args.gigabytes, 1e-6 * args.latency)
        lines += [
            f"| {row['gpus']} | {row['batch']:,} | {', '.join(map(str, heads))} "
            f"| {row['sums_mib']:.2f}, {row['sums_ms']:.2f} "
            f"| {row['gathered_mib']:.1f}, {row['gathered_ms']:.2f} |"
            for row in results["computed"][str(heads)]
        ]
    table = "\n".join(lines) + "\n"
    print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        title = ", ".join(
            f"{name} {value}" for name, value in settings.items() if name != "command"
        )
        (args.out / "distributed_cost.md").write_text(f"{title}.\n\n{table}")
        report = {"settings": settings, "results": results}
        (args.out / "distributed_cost.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
