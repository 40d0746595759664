"""Cost of the cluster terms, forward and backward, against the bare softmax-and-matmul floor.

    python examples/benchmarks/loss_cost.py [--out docs/results]

The floor is what any loss on batch-wise cluster assignments pays: the softmax of both views'
logits and one Gram matrix per head, with their gradients. All candidates run alternately in one
process, on one thread, and each ratio is the median over rounds of candidate / floor of the same
round. `targets` prints the largest ratios that the library promises at n = 256.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from c2bin_ext import BCAContrastiveLoss, C2BINLoss, ClusterEntropyRegularizer

Logits = list[tuple[Tensor, Tensor]]
TARGETS = {(32, 64, 128): 2.5, (512, 1024, 2048): 1.35}


def floor(logits: Logits) -> Tensor:
    return sum(((a.softmax(1).T @ b.softmax(1)).sum() for a, b in logits), torch.zeros(()))


def cluster_terms(contrast: BCAContrastiveLoss) -> Callable[[Logits], Tensor]:
    entropy = ClusterEntropyRegularizer()

    def run(logits: Logits) -> Tensor:
        total = torch.zeros(())
        for a, b in logits:
            view0, view1 = a.softmax(1), b.softmax(1)
            balance = (entropy(view0) + entropy(view1)) / 2
            total = total + contrast(view0, view1) + balance
        return total

    return run


def objective(logits: Logits) -> Tensor:
    n = logits[0][0].shape[0]
    embeddings = (torch.ones(n, 1), torch.ones(n, 1))
    heads = tuple(zip(*((a.softmax(1), b.softmax(1)) for a, b in logits), strict=True))
    return C2BINLoss()(embeddings, embeddings, heads).loss


def stacked_cosine(logits: Logits) -> Tensor:
    """The usual way: NT-Xent over the 2K columns of both views by their 2K x 2K cosines."""
    total = torch.zeros(())
    for a, b in logits:
        columns = torch.cat([a.softmax(1).T, b.softmax(1).T])
        k = a.shape[1]
        cosines = torch.nn.functional.cosine_similarity(columns[:, None], columns[None], dim=2)
        positives = torch.arange(2 * k).roll(k)
        mask = torch.eye(2 * k, dtype=torch.bool)
        scores = (cosines / 0.5).masked_fill(mask, -torch.inf)
        total = total + torch.nn.functional.cross_entropy(scores, positives)
        for view in (a, b):
            share = view.softmax(1).mean(0)
            total = total + (share * share.log()).sum() / 2
    return total


def measure(
    candidates: dict[str, Callable[[Logits], Tensor]], n: int, scales: tuple[int, ...], rounds: int
) -> dict[str, tuple[float, float]]:
    """Return per candidate the median milliseconds and the median ratio to the first."""
    generator = torch.Generator().manual_seed(0)
    logits = [
        tuple(torch.randn(n, k, generator=generator).requires_grad_() for _ in range(2))
        for k in scales
    ]
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 2):
        for name, run in candidates.items():
            for view in (view for pair in logits for view in pair):
                view.grad = None
            start = time.perf_counter()
            run(logits).backward()  # type: ignore[arg-type]
            if index >= 2:  # the first rounds warm allocator and threads up
                seconds[name].append(time.perf_counter() - start)
    base = next(iter(seconds.values()))
    return {
        name: (
            1e3 * statistics.median(values),
            statistics.median(v / b for v, b in zip(values, base, strict=True)),
        )
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=256, help="instances in the batch")
    parser.add_argument("--rounds", type=int, help="default: 300 for small heads, 25 for large")
    parser.add_argument("--out", type=Path, help="write loss_cost.json and loss_cost.md here")
    args = parser.parse_args()

    torch.set_num_threads(1)
    candidates: dict[str, Callable[[Logits], Tensor]] = {
        "floor: softmax and matmul": floor,
        "`BCAContrastiveLoss` + `ClusterEntropyRegularizer`": cluster_terms(BCAContrastiveLoss()),
        "`C2BINLoss`, alignment included": objective,
        '`similarity="dot"`': cluster_terms(BCAContrastiveLoss(similarity="dot")),
    }
    settings = {
        "command": "python examples/benchmarks/loss_cost.py",
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "threads": 1,
        "n": args.n,
        "dtype": "float32, eager",
    }
    title = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "command")
    lines = [f"{title}; medians of alternating rounds.", ""]
    lines += ["| K | what | ms | ratio to the floor | target |", "| --- | --- | --- | --- | --- |"]
    results = {}
    for scales, target in TARGETS.items():
        small = max(scales) <= 128
        rounds = args.rounds or (300 if small else 25)
        rows = measure(candidates, args.n, scales, rounds)
        if small:  # 2K x 2K x n is out of reach for the large heads, and slow enough for few rounds
            pair = {"floor": floor, "2K × 2K × n `cosine_similarity`": stacked_cosine}
            rows |= dict(list(measure(pair, args.n, scales, 3).items())[1:])
        results[str(scales)] = {
            name: {"ms": ms, "ratio": ratio} for name, (ms, ratio) in rows.items()
        }
        for name, (ms, ratio) in rows.items():
            wanted = f"≤ {target}" if name.startswith(("`BCA", "`C2BIN")) else ""
            lines.append(f"| {scales} | {name} | {ms:.3f} | {ratio:.2f} | {wanted} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "loss_cost.md").write_text(table)
        report = {"settings": settings, "results": results}
        (args.out / "loss_cost.json").write_text(json.dumps(report, indent=2) + "\n")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
