"""What bounds training: making views, loading them, or the training step.

    python examples/pipeline_cost.py [--workers 0 2] [--device cuda] [--out docs/results]

Images per second of each stage of `examples/demo.py` on photographs of 32 × 32 pixels (of random
pixels: their values cost nothing), each by itself: two views of an image made by one core, stored
views read by one core, views made in batches on tensors on the device, the loader with so many
worker processes, and C2BIN's whole step with a ResNet-18 on views that are on the device already;
then loader and step together. Where the two together are as fast as the step alone, the loader does
not hold the device up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from experiments.data import Images
from experiments.tensor_views import TensorViews
from experiments.training import loader_of
from experiments.views import EpochSampler, StoredViews, Views
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.hardware import processor
from benchmarks.steps import lightly_steps

SIZE = 32
Batch = tuple[tuple[Tensor, Tensor], Tensor]


def random_images(n: int) -> Images:
    """Return n photographs of noise, of ten classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 10
    classes = [str(i) for i in range(10)]
    return Images(pixels, labels, pixels[:10], labels[:10], classes, "random pixels")


def batches(views: Dataset[Any], n: int, batch_size: int, workers: int) -> Iterator[Batch]:
    """Yield batches without end, from the loader of the demo's training."""
    sampler = EpochSampler(n, batch_size, seed=0)
    pin_memory = torch.cuda.is_available()
    loader = loader_of(
        views, sampler, batch_size=batch_size, workers=workers, pin_memory=pin_memory
    )
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from loader


def per_second(work: Callable[[], int], seconds: float, clock: Callable[[], float]) -> float:
    """Return what `work` gets done in a second of `clock`, after one call to warm up."""
    work()
    begin, done = clock(), work()
    while (took := clock() - begin) < seconds:
        done += work()
    return done / took


def stage_rates(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return images per second of every stage."""
    images, device = random_images(args.images), torch.device(args.device)
    views = Views(images, "folder", seed=0)
    stored = StoredViews(folder / "views.npy", views, epochs=1)
    found: dict[str, float] = {}

    def one_by_one(dataset: Dataset[Any]) -> Callable[[], int]:
        places = count()
        return lambda: len([dataset[0, next(places) % args.images] for _ in range(64)])

    # Processor time of one core: what other programs take of it does not count.
    one_core = args.seconds, time.thread_time
    found["two views made, by one core"] = per_second(one_by_one(views), *one_core)
    found["two stored views read, by one core"] = per_second(one_by_one(stored), *one_core)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    sampler = EpochSampler(args.images, args.batch_size, seed=0)
    whole = TensorViews(images, "folder", sampler, args.batch_size, seed=0, device=device)
    made = (batch for _ in count() for batch in whole)

    def on_tensors() -> int:
        rows = len(next(made)[1])
        wait()
        return rows

    # On a CPU in processor time of one core, too; a GPU is waited for.
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    name = "on the device" if device.type == "cuda" else "by one core"
    found[f"two views made on tensors, {name}"] = per_second(on_tensors, args.seconds, clock)
    torch.set_num_threads(threads)

    step = lightly_steps(device)["C2BIN"]
    still = torch.rand(2, args.batch_size, 3, SIZE, SIZE, device=device)

    def train(view0: Tensor, view1: Tensor) -> int:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            step(view0, view1)
        wait()
        return len(view0)

    found["step alone"] = per_second(lambda: train(*still), args.seconds, time.perf_counter)
    for workers in args.workers:
        label = f"loader alone, {workers} workers"
        source = batches(views, args.images, args.batch_size, workers)

        def load(source: Iterator[Batch] = source) -> int:
            return len(next(source)[1])

        def both(source: Iterator[Batch] = source) -> int:
            view0, view1 = next(source)[0]
            return train(view0.to(device, non_blocking=True), view1.to(device, non_blocking=True))

        found[label] = per_second(load, args.seconds, time.perf_counter)
        found[f"loader and step, {workers} workers"] = per_second(
            both, args.seconds, time.perf_counter
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch-size", type=int, default=256)
    add("--images", type=int, default=2048, help="an epoch (default: 2048)")
    add("--workers", type=int, nargs="+", default=[0, os.cpu_count() or 1], metavar="W")
    add("--seconds", type=float, default=10.0, help="of each stage (default: 10)")
    add("--bf16", action="store_true", help="the step under autocast to bfloat16")
    add("--out", type=Path, help="write pipeline_cost_DEVICE.json and .md here")
    args = parser.parse_args()
    if args.batch_size < 2:
        parser.error(f"--batch-size {args.batch_size}: expected 2 at least")
    if args.images < args.batch_size:
        parser.error(f"--images {args.images}: expected {args.batch_size} at least, one batch")
    if min(args.workers) < 0:
        parser.error(f"--workers {min(args.workers)}: expected 0 at least")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no GPU that torch can use")
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {args.out}: {error.strerror}")

    with tempfile.TemporaryDirectory() as folder:
        rates = stage_rates(args, Path(folder))
    settings = {
        "command": shlex.join(["python", "examples/pipeline_cost.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "device": processor(torch.device(args.device)),
        "cores": os.cpu_count(),
        "batch size": args.batch_size,
        "images an epoch": args.images,
        "bf16": args.bf16,
        "seconds a stage": args.seconds,
        "python": platform.python_version(),
    }
    words = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "command")
    table = ["| stage | images a second |", "| --- | ---: |"]
    table += [f"| {name} | {rate:,.0f} |" for name, rate in rates.items()]
    text = "\n".join([f"{words}.", "", *table]) + "\n"
    print(text)
    if args.out:
        stem = f"pipeline_cost_{torch.device(args.device).type}"
        (args.out / f"{stem}.md").write_text(text)
        report = {"settings": settings, "images_per_second": rates}
        (args.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
