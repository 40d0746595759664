"""Cost of the cluster terms, forward and backward, against the bare softmax-and-matmul floor.

    python examples/benchmarks/loss_cost.py

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
    """Return per candidate the median milliseconds and the median ratio to the floor."""
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
    base = seconds["floor"]
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
    parser.add_argument("--rounds", type=int, default=None, help="default: 300 small, 25 large")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    args = parser.parse_args()

    torch.set_num_threads(1)
    contrast = BCAContrastiveLoss()
    candidates: dict[str, Callable[[Logits], Tensor]] = {
        "floor": floor,
        "BCAContrastiveLoss + ClusterEntropyRegularizer": cluster_terms(contrast),
        "C2BINLoss (alignment of 1-d embeddings)": objective,
        'similarity="dot"': cluster_terms(BCAContrastiveLoss(similarity="dot")),
    }
    report: dict[str, object] = {
        "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "n": args.n,
    }
    print(f"torch {torch.__version__}, one CPU thread, n = {args.n}, float32, eager")
    for scales, target in TARGETS.items():
        small = max(scales) <= 128
        # 2K x 2K x n: out of reach for the large heads.
        extra = {"2K x 2K cosine_similarity": stacked_cosine} if small else {}
        rounds = args.rounds or (300 if small else 25)
        rows = measure(candidates | extra, args.n, scales, rounds)
        report[str(scales)] = {
            name: {"ms": ms, "ratio": ratio} for name, (ms, ratio) in rows.items()
        }
        print(f"\nK = {scales}, median of {rounds} alternating rounds, target {target}")
        for name, (ms, ratio) in rows.items():
            print(f"  {name:48s} {ms:9.3f} ms   {ratio:6.2f} x floor")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
