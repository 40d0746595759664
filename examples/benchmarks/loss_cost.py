"""Cost of the cluster terms, forward and backward, against the bare softmax-and-matmul floor.

    python examples/benchmarks/loss_cost.py [--out docs/results]           # the promised ratios
    python examples/benchmarks/loss_cost.py --grid [--device cuda] [...]   # all sizes, compiled too

The floor is what any loss on batch-wise cluster assignments pays: the softmax of both views'
logits and one Gram matrix per head, with their gradients. All candidates of a row of sizes run
alternately in one process, and each ratio is the median over rounds of candidate / floor of the
same round. On the CPU it is one thread, and its processor time, so that other programs disturb
little; on a GPU it is the time until the GPU is done. Peak memory is what is allocated beyond the
inputs in one forward and backward pass. Operators are those that compute: on a GPU each launches a
kernel or two, which is most of the time of small heads. Beside this library's losses there are
lightly's SwaVLoss on the same assignments and NTXentLoss on embeddings of the same batch, the usual
2K × 2K cosine formulation, and Eq. 4 as loops over clusters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler is chatty

import torch
from hardware import processor
from lightly.loss import NTXentLoss, SwaVLoss
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from c2bin_ext import (
    BCAContrastiveLoss,
    C2BINLoss,
    ClusterEntropyRegularizer,
    MultiScaleClusterLoss,
)

Logits = list[tuple[Tensor, Tensor]]
Candidate = Callable[[Logits], Tensor]
SMALL, LARGE = (32, 64, 128), (512, 1024, 2048)
CLUSTERS = "`MultiScaleClusterLoss`"
APART = "`BCAContrastiveLoss` + `ClusterEntropyRegularizer`, head by head"
WHOLE = "`C2BINLoss`, alignment included"
SWAV = "lightly `SwaVLoss`"
FLOOR = "floor: softmax and matmul"
# (n, K): {what: (compared with, largest ratio)}
TARGETS: dict[tuple[int, tuple[int, ...]], dict[str, tuple[str, float]]] = {
    (256, SMALL): {CLUSTERS: (FLOOR, 2.0)},
    (1024, SMALL): {CLUSTERS: (FLOOR, 1.4)},
    (256, LARGE): {CLUSTERS: (FLOOR, 1.2)},
}
GRID_N = (64, 256, 1024, 8192)
GRID_K: tuple[tuple[int, ...], ...] = ((10,), SMALL, LARGE, (4096,))
EMBEDDING = 128  # dimensions of what NTXentLoss and the alignment compare
_LARGEST_STACK = 2**28  # entries of the 2K × 2K × n formulation: 1 GiB in float32
_LARGEST_LOOP = 2**13  # K² of the loops


def floor(logits: Logits) -> Tensor:
    return sum(
        ((a.softmax(1).T @ b.softmax(1)).sum() for a, b in logits), logits[0][0].new_zeros(())
    )


def clusters_of(**options: Any) -> Candidate:
    criterion = MultiScaleClusterLoss(**options)
    return lambda logits: criterion(heads_of(logits)).loss


def clusters_against_follower(logits: Logits) -> Tensor:
    with torch.no_grad():
        fixed = heads_of(logits)
    loss: Tensor = MultiScaleClusterLoss()(heads_of(logits), target_assignments=fixed).loss
    return loss


def cluster_terms(**options: Any) -> Candidate:
    contrast, entropy = BCAContrastiveLoss(**options), ClusterEntropyRegularizer()

    def run(logits: Logits) -> Tensor:
        total = logits[0][0].new_zeros(())
        for a, b in logits:
            view0, view1 = a.softmax(1), b.softmax(1)
            balance = (entropy(view0) + entropy(view1)) / 2
            total = total + contrast(view0, view1) + balance
        return total

    return run


def contrast_alone(logits: Logits) -> Tensor:
    contrast = BCAContrastiveLoss()
    return sum(
        (contrast(a.softmax(1), b.softmax(1)) for a, b in logits), logits[0][0].new_zeros(())
    )


def entropy_alone(logits: Logits) -> Tensor:
    entropy = ClusterEntropyRegularizer()
    views = (view for pair in logits for view in pair)
    return sum((entropy(view.softmax(1)) for view in views), logits[0][0].new_zeros(()))


def heads_of(logits: Logits) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(zip(*((a.softmax(1), b.softmax(1)) for a, b in logits), strict=True))


def objective(logits: Logits) -> Tensor:
    first = logits[0][0]
    embeddings = (first.new_ones(len(first), EMBEDDING),) * 2
    loss: Tensor = C2BINLoss()(embeddings, embeddings, heads_of(logits)).loss
    return loss


def against_follower(logits: Logits) -> Tensor:
    """What the adapters do: two Gram matrices a head, and the softmax of the follower's logits."""
    first = logits[0][0]
    embeddings = (first.new_ones(len(first), EMBEDDING),) * 2
    with torch.no_grad():
        fixed = heads_of(logits)
    heads = heads_of(logits)
    found = C2BINLoss()(embeddings, embeddings, heads, target_assignments=fixed)
    loss: Tensor = found.loss
    return loss


def swav(logits: Logits) -> Tensor:
    """SwaV's loss, three Sinkhorn iterations, with the logits in place of scores of prototypes."""
    loss = SwaVLoss()
    scores = ([a, b] for a, b in logits)
    return sum((loss(pair, []) for pair in scores), logits[0][0].new_zeros(()))


def ntxent(logits: Logits) -> Tensor:
    """NT-Xent between instances; the embeddings are columns of logits, repeated to the width."""
    a, b = (view.repeat(1, -(-EMBEDDING // view.shape[1]))[:, :EMBEDDING] for view in logits[0])
    loss: Tensor = NTXentLoss(temperature=0.5)(a, b)
    return loss


def stacked_cosine(logits: Logits) -> Tensor:
    """The usual way: NT-Xent over the 2K columns of both views by their 2K x 2K cosines."""
    total = logits[0][0].new_zeros(())
    for a, b in logits:
        columns = torch.cat([a.softmax(1).T, b.softmax(1).T])
        k = a.shape[1]
        cosines = cosine_similarity(columns[:, None], columns[None], dim=2)
        positives = torch.arange(2 * k, device=a.device).roll(k)
        mask = torch.eye(2 * k, dtype=torch.bool, device=a.device)
        total = total + cross_entropy((cosines / 0.5).masked_fill(mask, -torch.inf), positives)
        for view in (a, b):
            share = view.softmax(1).mean(0)
            total = total + (share * share.log()).sum() / 2
    return total


def loops(logits: Logits) -> Tensor:
    """Eq. 4 as written, cluster by cluster."""
    total = logits[0][0].new_zeros(())
    for a, b in logits:
        view0, view1 = a.softmax(1), b.softmax(1)
        k = a.shape[1]
        for i in range(k):
            scores = [cosine_similarity(view0[:, i], view1[:, j], dim=0) / 0.5 for j in range(k)]
            total = total + (torch.stack(scores).logsumexp(0) - scores[i]) / k
    return total


def candidates_for(
    n: int, scales: tuple[int, ...], grid: bool, compiled: bool
) -> dict[str, Candidate]:
    found: dict[str, Candidate] = {
        FLOOR: floor,
        CLUSTERS: clusters_of(),
        f"{CLUSTERS}, against the follower": clusters_against_follower,
        APART: cluster_terms(),
        WHOLE: objective,
        f"{WHOLE}, against the follower": against_follower,
        f'{CLUSTERS}, `similarity="dot"`': clusters_of(similarity="dot"),
        f"{CLUSTERS}, as printed": clusters_of(
            similarity="dot", symmetric=False, positive_in_denominator=False
        ),
    }
    if grid:
        found |= {
            "`BCAContrastiveLoss`": contrast_alone,
            "`ClusterEntropyRegularizer`": entropy_alone,
        }
        if compiled:
            options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
            found |= {
                f"{CLUSTERS}, compiled": torch.compile(clusters_of(), **options),
                f"{WHOLE}, compiled": torch.compile(objective, **options),
            }
    if grid or n != 256:
        found[SWAV] = swav
        found["lightly `NTXentLoss`, instances"] = ntxent
    return found


def slow_candidates(n: int, scales: tuple[int, ...], grid: bool) -> dict[str, Candidate]:
    """What takes so long that it would disturb the others, and gets few rounds of its own."""
    found: dict[str, Candidate] = {}
    if sum((2 * k) ** 2 for k in scales) * n <= _LARGEST_STACK:
        found["2K × 2K × n `cosine_similarity`"] = stacked_cosine
    if grid and sum(k * k for k in scales) <= _LARGEST_LOOP:
        found["loops over clusters"] = loops
    return found


def timed(run: Candidate, logits: Logits) -> float:
    device = logits[0][0].device
    for view in (view for pair in logits for view in pair):
        view.grad = None
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    _wait(device)
    start = clock()
    run(logits).backward()
    _wait(device)
    return clock() - start


def peak_bytes(run: Candidate, logits: Logits) -> int:
    """Bytes allocated at most, beyond the inputs and their gradients' places."""
    device = logits[0][0].device
    timed(run, logits)
    for view in (view for pair in logits for view in pair):
        view.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        timed(run, logits)
        return torch.cuda.max_memory_allocated(device) - before
    kind = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kind, profile_memory=True) as profile:
        timed(run, logits)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = largest = 0
    for _, change in changes:
        now += change
        largest = max(largest, now)
    return largest


class Operators(TorchDispatchMode):
    """Counts what computes: neither views of other tensors nor memory without values."""

    count = 0
    without_work = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        infos = (returned.alias_info for returned in func._schema.returns)
        view = any(info is not None and not info.is_write for info in infos)
        self.count += not view and func.overloadpacket.__name__ not in self.without_work
        return func(*args, **(kwargs or {}))


def operators(run: Candidate, logits: Logits) -> int:
    counter = Operators()
    with counter:
        timed(run, logits)
    return counter.count


def measure(
    candidates: dict[str, Candidate], logits: Logits, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Return seconds of each candidate, round by round; as many rounds as fit, three at least."""
    took: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    for index in range(rounds + 2):
        for name, run in candidates.items():
            elapsed = timed(run, logits)
            if index >= 2:  # the first rounds warm up allocator and threads, and compile
                took[name].append(elapsed)
        if index >= 4 and time.perf_counter() > end:
            break
    return took


def row(
    name: str, run: Candidate, logits: Logits, took: list[float], base: list[float]
) -> dict[str, Any]:
    return {
        "what": name,
        "ms": 1e3 * statistics.median(took),
        "ratio": statistics.median(t / b for t, b in zip(took, base, strict=True)),
        "rounds": len(took),
        "peak_mib": peak_bytes(run, logits) / 2**20,
        # Compiled, nothing is dispatched that could be counted.
        "operators": None if name.endswith("compiled") else operators(run, logits),
    }


def compare(
    n: int, scales: tuple[int, ...], args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the table of one size, and what became of its targets."""
    generator = torch.Generator().manual_seed(0)
    logits = [
        tuple(
            torch.randn(n, k, generator=generator).to(args.device).requires_grad_()
            for _ in range(2)
        )
        for k in scales
    ]
    torch.compiler.reset()  # else the sizes before count towards Dynamo's limit of recompilations
    candidates = candidates_for(n, scales, args.grid, args.compile)
    took = measure(candidates, logits, args.rounds, args.seconds)  # type: ignore[arg-type]
    rows = [
        row(name, run, logits, took[name], took[FLOOR])  # type: ignore[arg-type]
        for name, run in candidates.items()
    ]
    for name, run in slow_candidates(n, scales, args.grid).items():
        slow = measure({FLOOR: floor, name: run}, logits, 3, 0.0)  # type: ignore[arg-type]
        rows.append(row(name, run, logits, slow[name], slow[FLOOR]))  # type: ignore[arg-type]
    targets = []
    for name, (other, largest) in TARGETS.get((n, scales), {}).items():
        ratio = statistics.median(t / o for t, o in zip(took[name], took[other], strict=True))
        targets.append(
            {
                "n": n,
                "K": scales,
                "what": name,
                "against": other,
                "ratio": ratio,
                "at_most": largest,
            }
        )
    return rows, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", action="store_true", help="all sizes instead of the targets'")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--n", type=int, nargs="+", help="only these batch sizes")
    parser.add_argument(
        "--clusters", nargs="+", metavar="K,K,…", help="only these heads, such as 10 32,64,128"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--rounds", type=int, default=300, help="at most so many")
    parser.add_argument("--seconds", type=float, default=15.0, help="rounds that fit into these")
    parser.add_argument(
        "--out", type=Path, help="write loss_cost.json and .md (_cuda, _grid_DEVICE) here"
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    device = torch.device(args.device)
    heads = [tuple(map(int, text.split(","))) for text in args.clusters or []]
    sizes = [(n, k) for n in GRID_N for k in GRID_K] if args.grid else list(TARGETS)
    sizes = [(n, k) for n, k in sizes if n in (args.n or [n]) and k in (heads or [k])]
    settings = {
        "command": shlex.join(["python", "examples/benchmarks/loss_cost.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "device": processor(device),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "alternating rounds": f"3 to {args.rounds}, {args.seconds:g} s",
        "python": platform.python_version(),
    }
    title = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "command")
    lines = [f"{title}.", ""]
    lines += ["| n | K | what | ms | ratio to the floor | peak MiB | operators |"]
    lines += ["| --- " * 3 + "| ---: " * 4 + "|"]
    print("\n".join(lines), flush=True)
    results, met = [], []
    for n, scales in sizes:
        rows, targets = compare(n, scales, args)
        met += targets
        for found in rows:
            results.append({"n": n, "K": scales, **found})
            lines.append(
                f"| {n} | {', '.join(map(str, scales))} | {found['what']} | {found['ms']:.3f} "
                f"| {found['ratio']:.2f} | {found['peak_mib']:.1f} | {found['operators'] or ''} |"
            )
            print(lines[-1], flush=True)
    for t in met:  # for whoever changes the losses: no part of the table
        size = f"n = {t['n']}, K = {', '.join(map(str, t['K']))}"
        print(f"{t['what']}, {size}: {t['ratio']:.2f} of {t['against']}, at most {t['at_most']}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = f"loss_cost_grid_{device.type}" if args.grid else "loss_cost"
        stem += "_cuda" if device.type == "cuda" and not args.grid else ""
        (args.out / f"{stem}.md").write_text("\n".join(lines) + "\n")
        report = {"settings": settings, "results": results, "targets": met}
        (args.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
