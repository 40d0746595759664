"""SimCLR, MoCo v2, BYOL and C2BIN through lightly's own benchmark: one set of settings, one table.

With --lightly CHECKOUT every method goes through lightly's ImageNet script, benchmarks/imagenet/
resnet50/main.py of its git repository, which trains and evaluates it: ResNet-50, 224 pixels,
lightly's own SimCLR, MoCo v2 and BYOL. Without it, through lightly's BenchmarkModule of the pip
package, the form of its CIFAR-10 benchmark: a torchvision ResNet on small images.

    python examples/lightly_benchmark.py --train-dir cifar/train --val-dir cifar/test
    python examples/lightly_benchmark.py --lightly ~/lightly --train-dir imagenet/train \\
        --val-dir imagenet/val --num-classes 1000 --devices 8 --batch-size-per-device 32

The folders hold one folder of images a class. Finished methods are not run again and an
interrupted one goes on after its last whole epoch; the table is in OUT/results.md and, with
settings, versions and hardware, in OUT/results.json. More, at the end and after --, goes to the
script as it is: -- --skip-finetune-eval.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import c2bin_lightly
import torch
from c2bin_explore.backbones import backbone
from c2bin_lightly.benchmark import TABLE_7
from lightly.data import LightlyDataset
from lightly.transforms import SimCLRTransform
from lightly.utils.benchmarking import LinearClassifier, MetricCallback
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from torchvision import transforms as T  # noqa: N812 - as everybody calls it

from c2bin_ext import C2BINLoss
from experiments.data import counted
from experiments.hardware import hardware, versions
from experiments.options import exit_code, first_process, quieten
from experiments.report import heads_table, markdown
from experiments.store import ExperimentError, Result, Store

LABELS = {"simclr": "SimCLR", "mocov2": "MoCo v2", "byol": "BYOL", "c2bin": "C2BIN"}
FORMS: dict[str, Callable[..., LightningModule]] = {
    "simclr": c2bin_lightly.SimCLRBenchmark,
    "mocov2": c2bin_lightly.MoCoV2Benchmark,
    "byol": c2bin_lightly.BYOLBenchmark,
    "c2bin": c2bin_lightly.C2BINBenchmark,
}
# Of the CIFAR-10 form, alike for all; the rate is lightly's for SGD, linear in the batch.
OPTIMIZATION = {"optimizer": "sgd", "weight_decay": 5e-4, "momentum": 0.9, "schedule": "cosine"}
LR_PER_256 = 0.06 * 2
ROW = re.compile(r"^\| (\w+) +\| ([\w/]+) +\| ([\d.naif-]+) +\|$", re.MULTILINE)
MAX = re.compile(r"^max (val_online_cls_top\d): ([\d.naif-]+)$", re.MULTILINE)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint of pretraining below a folder, if there is one."""
    found = [p for p in folder.glob("**/*.ckpt") if "eval" not in p.relative_to(folder).as_posix()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def through_the_script(args: argparse.Namespace, method: str, folder: Path) -> dict[str, float]:
    """Run lightly's ImageNet script on a method and return what it printed and logged."""
    command = [sys.executable, "-m", "c2bin_lightly"]
    if args.num_clusters:
        command += ["--num-clusters", ",".join(map(str, args.num_clusters))]
    command += [str(args.script), "--methods", method, "--log-dir", str(folder)]
    for name in (
        *("train_dir", "val_dir", "batch_size_per_device", "epochs", "num_workers", "accelerator"),
        *("devices", "precision", "strategy", "num_classes", "knn_k", "knn_t", "seed"),
    ):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        command += ["--ckpt-path", str(checkpoint)]
    command += args.more
    log = folder / "log.txt"
    with (
        log.open("ab") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
    ):
        assert process.stdout is not None
        begins = log.stat().st_size
        try:
            # As it comes, so that Lightning's bars move.
            while part := os.read(process.stdout.fileno(), 65536):
                kept.write(part)
                kept.flush()
                sys.stderr.buffer.write(part)
                sys.stderr.flush()
        except KeyboardInterrupt:
            process.wait()
            raise
    text = log.read_bytes()[begins:].decode(errors="replace")
    if process.returncode:
        last = [line for line in text.splitlines() if "Error" in line or "Exception" in line]
        raise ExperimentError(
            f"the script ended with code {process.returncode}; {log}: {(last or [''])[-1].strip()}"
        )
    scores = {f"max {name}": float(value) for name, value in MAX.findall(text)}
    scores |= {
        f"{evaluation} {metric.split('/')[0].removeprefix('val_').removeprefix('knn_')}": float(v)
        for evaluation, metric, v in ROW.findall(text)
    }
    return scores | last_logged(folder)


def last_logged(folder: Path) -> dict[str, float]:
    """Return the last value of each cluster score in the newest TensorBoard log below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = sorted(folder.glob("*/pretrain/*/events*"), key=lambda path: path.stat().st_mtime)
    if not events:
        return {}
    log = EventAccumulator(str(events[-1])).Reload()
    names = [name for name in log.Tags()["scalars"] if re.search(r"^val_.*_\d+_of_\d+$", name)]
    return {name: log.Scalars(name)[-1].value for name in names}


def through_the_module(args: argparse.Namespace, method: str, folder: Path) -> dict[str, float]:
    """Train a method as lightly's BenchmarkModule; return lightly's kNN and linear evaluation."""
    seed_everything(args.seed, workers=True, verbose=False)
    size, norm = args.image_size, {"mean": [0.5] * 3, "std": [0.5] * 3}
    still = T.Compose(
        [T.Resize(size), T.CenterCrop(size), T.ToTensor(), T.Normalize(*norm.values())]
    )
    crops = T.Compose(
        [
            *(T.RandomResizedCrop(size), T.RandomHorizontalFlip()),
            *(T.ToTensor(), T.Normalize(*norm.values())),
        ]
    )
    views = SimCLRTransform(input_size=size, cj_strength=0.5, gaussian_blur=0.0, normalize=norm)

    def loader(where: Path, transform: Any, train: bool) -> DataLoader[Any]:
        return DataLoader(
            LightlyDataset(str(where), transform=transform),
            batch_size=args.batch_size_per_device,
            shuffle=train,
            drop_last=train,
            num_workers=args.num_workers,
            persistent_workers=args.num_workers > 0,
        )

    bank, val = loader(args.train_dir, still, False), loader(args.val_dir, still, False)
    assert isinstance(bank.dataset, LightlyDataset)
    # Its 3 × 3 stem is that of small images.
    net, features = backbone(args.backbone, 32 if args.stem == "cifar" else 224)
    options: dict[str, Any] = {}
    if method == "mocov2":
        # A queue longer than the data set makes every image its own negative.
        queue = len(bank.dataset) // 2 // args.batch_size_per_device * args.batch_size_per_device
        options["queue_size"] = min(4096, max(args.batch_size_per_device, queue))
    if method == "c2bin" and args.num_clusters:
        options["num_clusters"] = args.num_clusters
    rate = LR_PER_256 * args.batch_size_per_device * args.devices / 256
    model = FORMS[method](
        bank,
        args.num_classes,
        min(args.knn_k, len(bank.dataset)),
        args.knn_t,
        backbone=net,
        feature_dim=features,
        lr=rate,
        warmup_epochs=min(10, args.epochs // 10),
        **OPTIMIZATION,
        **options,
    )
    common: dict[str, Any] = {
        name: getattr(args, name) for name in ("accelerator", "devices", "precision", "strategy")
    }
    trainer = Trainer(
        max_epochs=args.epochs,
        default_root_dir=str(folder),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        **common,
    )
    trainer.fit(
        model, loader(args.train_dir, views, True), val, ckpt_path=newest_checkpoint(folder)
    )
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    scores: dict[str, Any] = {"knn top1": found["kNN_accuracy"] / 100}
    scores["max knn top1"] = model.max_accuracy
    classifier = LinearClassifier(
        model, args.batch_size_per_device, feature_dim=features, num_classes=args.num_classes
    )
    linear = MetricCallback()
    evaluator = Trainer(
        max_epochs=args.linear_epochs,
        callbacks=[linear],
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **common,
    )
    evaluator.fit(classifier, loader(args.train_dir, crops, True), val)
    scores |= {f"linear top{k}": max(linear.val_metrics[f"val_top{k}"]) for k in (1, 5)}
    return scores | {n: v for n, v in found.items() if re.search(r"^val_.*_\d+_of_\d+$", n)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the scores of all methods, a row each, then those of C2BIN's heads."""
    names = [
        *("linear top1", "linear top5", "knn top1", "knn top5", "max knn top1"),
        *("finetune top1", "finetune top5", "max val_online_cls_top1", "max val_online_cls_top5"),
    ]
    names = [n for n in names if any(n in result["scores"] for result in results.values())]
    body = []
    for method, result in results.items():
        cells = [f"{result['scores'][n]:.3f}" if n in result["scores"] else "" for n in names]
        minutes = "" if result.get("failed") else f"{result['seconds'] / 60:.1f}"
        body.append([LABELS[method], *cells, minutes])
    parts = [markdown(["method", *names, "minutes"], body)]
    parts += [
        f"{LABELS[method]} has no scores: {result['failed']}"
        for method, result in results.items()
        if result.get("failed")
    ]
    scores = results.get("c2bin", {"scores": {}})["scores"]
    return "\n\n".join([*parts, *heads_table([scores])])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake ends in argparse's message."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--lightly", type=Path, metavar="CHECKOUT", help="lightly's git repository")
    add("--train-dir", type=Path, required=True)
    add("--val-dir", type=Path, required=True)
    add("--out", type=Path, default=Path("runs/lightly"), help="default: runs/lightly")
    add("--methods", nargs="+", choices=[*LABELS], default=[*LABELS], help="default: all")
    add("--epochs", type=int, default=100, help="default: 100; lightly's script needs 10")
    add("--batch-size-per-device", type=int, default=128, help="default: 128")
    add("--num-classes", type=int, default=10, help="default: 10")
    add("--num-clusters", type=int, nargs="+", metavar="K", help="of C2BIN's heads")
    add("--knn-k", type=int, default=200, help="default: 200")
    add("--knn-t", type=float, default=0.1, help="default: 0.1")
    add("--seed", type=int, default=0, help="default: 0")
    add("--devices", type=int, default=1, help="default: 1")
    add("--accelerator", default="gpu" if torch.cuda.is_available() else "cpu")
    add("--precision", help="default: 16-mixed on a GPU, 32 on a CPU")
    add("--strategy", help="default: lightly's, or auto for one device")
    add("--num-workers", type=int, default=8, help="for each device; default: 8")
    group = parser.add_argument_group("without --lightly")
    group.add_argument("--backbone", choices=["resnet18", "resnet34", "resnet50"])
    group.add_argument("--stem", choices=["cifar", "imagenet"], help="default: cifar")
    group.add_argument("--image-size", type=int, help="default: 32")
    group.add_argument("--linear-epochs", type=int, help="default: 90, as in lightly's script")
    add("--overwrite", action="store_true", help="replace a table that other settings made")
    add(
        "--smoke",
        action="store_true",
        help="only check that all works: fewest epochs, small heads, kNN of 5; scores mean nothing",
    )
    add("more", nargs="*", help="after --: options of lightly's script")
    args = parser.parse_args(argv)
    small = {"backbone": "resnet18", "stem": "cifar", "image_size": 32, "linear_epochs": 90}
    if args.lightly:
        args.script = args.lightly / "benchmarks/imagenet/resnet50/main.py"
        if not args.script.is_file():
            parser.error(f"--lightly {args.lightly} has no benchmarks/imagenet/resnet50/main.py")
        for name in small:
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is fixed by lightly's script")
    else:
        if args.more:
            parser.error(f"{' '.join(args.more)}: options of lightly's script need --lightly")
        for name, value in small.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    if args.smoke:
        args.epochs, args.num_clusters, args.knn_k = (10 if args.lightly else 2), [4, 8], 5
        if not args.lightly:
            args.stem, args.linear_epochs = "imagenet", 2
    if args.num_classes < 5:
        parser.error(f"--num-classes {args.num_classes}: lightly's top-5 accuracy takes 5 at least")
    for name in ("train_dir", "val_dir"):
        folder, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if not folder.is_dir():
            parser.error(f"{option}: there is no folder {folder}")
        counts = counted(folder)
        if len(counts) != args.num_classes or not all(counts.values()):
            parser.error(
                f"{option}: expected images of --num-classes {args.num_classes} classes in "
                f"{folder}, got {sum(map(bool, counts.values()))}"
            )
        images = sum(counts.values())
        if name == "train_dir" and images < args.batch_size_per_device * args.devices:
            parser.error(f"{option}: {folder} has {images} images, fewer than one batch")
        if name == "train_dir" and args.lightly and args.knn_k > images:
            parser.error(f"--knn-k {args.knn_k}: expected at most {images}, the training images")
    if args.precision is None:
        args.precision = "16-mixed" if args.accelerator == "gpu" else "32"
    if args.strategy is None:
        args.strategy = "ddp_find_unused_parameters_true" if args.devices > 1 else "auto"
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the numbers depend on; methods can be added to an --out."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in sorted(vars(args).items())
        if name not in ("out", "methods", "num_workers", "overwrite")
    }
    # With all defaults: when they change, results are others.
    settings["objective"] = (
        f"against the runner, {C2BINLoss(**TABLE_7)!r}"
        if args.lightly
        else f"against the follower, L2-normalised features, {C2BINLoss()!r}"
    )
    return settings


def timed(args: argparse.Namespace, method: str, folder: Path) -> Result | None:
    """Run a method; None where another process keeps the result."""
    began = time.perf_counter()
    try:
        scores = (through_the_script if args.lightly else through_the_module)(args, method, folder)
    except SystemExit:  # Lightning makes an exit of Ctrl-C
        raise KeyboardInterrupt from None
    return {"scores": scores, "seconds": time.perf_counter() - began} if first_process() else None


def run(args: argparse.Namespace) -> int:
    """Run every method; write the table. Return 1 if a method failed."""
    settings, store = settings_of(args), Store(args.out)
    if first_process():
        store.claim("results", settings, args.overwrite)
    results: dict[str, Result] = {}
    for count, method in enumerate(args.methods, start=1):
        if first_process():
            where = store.folder(method, settings)
            print(f"{LABELS[method]}, {count} of {len(args.methods)}: {where}", flush=True)
        try:
            results[method] = store.run(method, settings, partial(timed, args, method)) or {}
        except ExperimentError as error:
            results[method] = {"scores": {}, "failed": str(error)}
    if not first_process():
        return 0
    record = {"settings": settings, "versions": versions(), "hardware": hardware()}
    text = table(results)
    store.publish("results", record | {"results": results}, text)
    print(f"\n{text}\n\nTable and numbers: {args.out}")
    return 1 if any(result.get("failed") for result in results.values()) else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, 1 if a method failed, 2 for a mistake, 130 for Ctrl-C."""
    args = parse(argv)
    quieten()
    return exit_code("lightly_benchmark.py", lambda: run(args), args.out)
