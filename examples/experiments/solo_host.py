"""C2BIN beside SimCLR, MoCo v2+ and BYOL, all trained and evaluated by solo-learn's own scripts.

Every method gets the same images, views, backbone, optimiser, epochs and seeds. solo-learn
pretrains (main_pretrain.py), evaluates linearly (main_linear.py) and by nearest neighbours
(main_knn.py); this script starts them and puts what they wrote into one table, OUT/results.md and
OUT/results.json.

  python examples/solo_benchmark.py --solo-learn CHECKOUT --data FOLDER --out OUT
  python examples/solo_benchmark.py --solo-learn CHECKOUT --smoke --out OUT    minutes, no images

FOLDER holds train/<class>/<image> and test/<class>/<image>. Ctrl-C at any time: the same command
goes on with the stage that was running, from the last epoch that solo-learn saved.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from experiments.data import counted
from experiments.hardware import hardware, versions
from experiments.options import exit_code
from experiments.report import heads_table, markdown, mean_and_spread, over_seeds
from experiments.store import ExperimentError, Result, Store

METHODS = {"simclr": "SimCLR", "mocov2plus": "MoCo v2+", "byol": "BYOL", "c2bin": "C2BIN"}
STAGES = ("pretrain", "linear", "knn")
# The widths of the paper's Table 5 for all; temperatures and momentum of solo-learn's recipes.
PROJECTOR = {"proj_hidden_dim": 512, "proj_output_dim": 512}
BOOTSTRAP = {**PROJECTOR, "pred_hidden_dim": 512}
PACKAGES = ("solo-learn", "lightning", "timm", "torchmetrics")
Stage = tuple[str, int, str]  # method, seed, one of STAGES


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    arguments = parse(argv)
    # A scheduler's stop is Ctrl-C: else the script that is running would go on by itself.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return exit_code("solo_benchmark.py", lambda: run(arguments), arguments.out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake ends in argparse's message."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--solo-learn", type=Path, required=True, help="checkout of solo-learn")
    add("--data", type=Path, help="folder with train/ and test/, one folder per class in each")
    add("--data-name", help="what to call the images; default: the folder's name")
    add("--out", type=Path, required=True, help="where runs and results go")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", nargs="+", type=int, default=[5])
    add("--backbone", default="resnet18")
    add("--crop-size", type=int, choices=(32, 96, 224), default=224, help="of the views")
    add("--epochs", type=int, default=100)
    add("--batch-size", type=int, default=256, help="of each process")
    add("--lr", type=float, default=0.12, help="per 256 images: solo-learn scales it")
    add("--queue-size", type=int, default=4096, help="of MoCo v2+, a multiple of the batch size")
    add("--clusters", nargs="+", type=int, default=[32, 64, 128], help="of C2BIN's heads")
    add("--linear-epochs", type=int, default=100)
    add("--linear-lr", type=float, default=0.3, help="per 256 images: solo-learn scales it")
    add("--k", type=int, default=20, help="neighbours")
    add("--workers", type=int, default=4)
    add("--devices", type=int, default=1, help="GPUs, or processes on a CPU")
    add("--overwrite", action="store_true", help="replace a table that other settings made")
    add("--smoke", action="store_true", help="seconds of training on random images")
    arguments = parser.parse_args(argv)
    if not (arguments.solo_learn / "main_pretrain.py").is_file():
        parser.error(f"--solo-learn: there is no main_pretrain.py in {arguments.solo_learn}")
    if arguments.smoke:
        arguments.data, arguments.data_name = arguments.out / "images", "random images"
        arguments.epochs = arguments.linear_epochs = 1
        arguments.crop_size, arguments.batch_size, arguments.queue_size = 32, 8, 32
        arguments.clusters, arguments.k, arguments.workers = [4, 8], 5, 0
        Store(arguments.out).open()
        draw_images(arguments.data)
    elif arguments.data is None:
        parser.error("--data: expected a folder with train/ and test/")
    for split in ("train", "test"):
        folder = arguments.data / split
        if not folder.is_dir():
            parser.error(f"--data: there is no folder {folder}")
        counts = counted(folder)
        if len(counts) < 5 or not all(counts.values()):
            parser.error(f"--data: expected images of 5 classes or more in {folder}, got {counts}")
        if split == "train" and sum(counts.values()) < arguments.batch_size * arguments.devices:
            parser.error(f"--batch-size {arguments.batch_size}: fewer images in {folder}")
    if arguments.queue_size % arguments.batch_size:
        parser.error("--queue-size: expected a multiple of --batch-size")
    return arguments


def draw_images(folder: Path) -> None:
    """Draw noise: five classes, as many as main_linear needs, each of its own brightness."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for label in range(5):
            target = folder / split / f"class{label}"
            target.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = draw.integers(45 * label, 45 * label + 75, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{number}.png")


def run(arguments: argparse.Namespace) -> None:
    """Run every stage of every method that is not there yet; write the table."""
    settings, store = settings_of(arguments), Store(arguments.out)
    store.claim("results", settings, arguments.overwrite)
    runs = [(m, s) for s in arguments.seeds for m in arguments.methods]
    stages = [(m, s, stage) for m, s in runs for stage in STAGES]
    results: dict[tuple[str, int], Result] = {pair: {} for pair in runs}
    with tqdm(stages, unit="stage") as bar:
        for stage in bar:
            method, seed, what = stage
            bar.set_description(f"{METHODS[method]}, seed {seed}, {what}")
            pretrained = store.folder(f"{method}-seed{seed}-pretrain", settings)
            work = partial(carry_out, arguments, pretrained, stage, bar)
            found = store.run(f"{method}-seed{seed}-{what}", settings, work)
            results[method, seed] |= found or {}
    record: dict[str, Any] = {
        "settings": settings,
        "versions": versions(*PACKAGES),
        "hardware": hardware(),
    }
    record["runs"] = [{"method": m, "seed": s, **results[m, s]} for m, s in runs]
    text = table(arguments, results)
    store.publish("results", record, text)
    print(text)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the numbers depend on; no path, so that results can be published."""
    skipped = {"solo_learn", "data", "out", "workers", "methods", "seeds", "data_name", "overwrite"}
    settings = {k: v for k, v in sorted(vars(arguments).items()) if k not in skipped}
    counts = {s: sum(counted(arguments.data / s).values()) for s in ("train", "test")}
    return {"data": arguments.data_name or arguments.data.name, "images": counts, **settings}


def carry_out(
    arguments: argparse.Namespace, pretrained: Path, stage: Stage, bar: Any, folder: Path
) -> Result:
    """Run one script of solo-learn and return what it wrote."""
    start = time.perf_counter()
    log = execute(command(arguments, pretrained, stage), folder, bar)
    seconds = round(time.perf_counter() - start, 1)
    read = {"pretrain": read_pretraining, "linear": read_linear, "knn": read_knn}[stage[2]]
    return read(log) | {f"{stage[2]}_seconds": seconds}


def command(arguments: argparse.Namespace, pretrained: Path, stage: Stage) -> list[str]:
    """Return the command line of one stage."""
    method, seed, what = stage
    data = arguments.data.resolve()
    # The launcher, because main_knn asks for CUDA by name; the other two are started as they are.
    scripts = arguments.solo_learn.resolve()
    if what == "knn":
        return [
            *(sys.executable, "-m", "c2bin_solo", f"{scripts}/main_knn.py"),
            *("--dataset", "custom", "--k", str(arguments.k), "--distance_function", "cosine"),
            *("--temperature", "0.07", "--feature_type", "backbone"),
            *("--train_data_path", f"{data}/train", "--val_data_path", f"{data}/test"),
            *("--batch_size", str(arguments.batch_size), "--num_workers", str(arguments.workers)),
            *("--pretrained_checkpoint_dir", str(checkpoint(pretrained).parent)),
        ]
    linear = what == "linear"
    gpu = torch.cuda.is_available()
    devices = str(list(range(arguments.devices))).replace(" ", "") if gpu else arguments.devices
    several = arguments.devices > 1
    common = [
        *(f"seed={seed}", f"max_epochs={arguments.linear_epochs if linear else arguments.epochs}"),
        *("data.dataset=custom", f"data.train_path={data}/train", f"data.val_path={data}/test"),
        *(f"data.num_workers={arguments.workers}", f"optimizer.batch_size={arguments.batch_size}"),
        *(f"backbone.name={arguments.backbone}", "optimizer.name=sgd", "~optimizer.kwargs"),
        f"optimizer.lr={arguments.linear_lr if linear else arguments.lr}",
        f"accelerator={'gpu' if gpu else 'cpu'}",
        f"devices={devices}" if gpu else f"devices='{devices}'",
        f"strategy={'ddp' if several else 'auto'}",
        f"precision={'16-mixed' if gpu else '32'}",
        f"sync_batchnorm={gpu and several}",
    ]
    common[0] = f"+{common[0]}"
    if linear:
        more = [
            *("--config-name", "c2bin-linear-custom", "optimizer.weight_decay=0"),
            f"pretrain_method={method}",
            f"pretrained_feature_extractor='{checkpoint(pretrained)}'",
        ]
        return [sys.executable, f"{scripts}/main_linear.py", *more, *common]
    options: dict[str, dict[str, Any]] = {
        "simclr": PROJECTOR | {"temperature": 0.2},
        "mocov2plus": PROJECTOR | {"temperature": 0.2, "queue_size": arguments.queue_size},
        "byol": BOOTSTRAP,
        "c2bin": BOOTSTRAP | {"num_clusters": arguments.clusters},
    }
    kwargs = json.dumps(options[method]).replace('"', "").replace(" ", "")
    more = [
        *("--config-name", "c2bin-custom", f"name={method}", f"method={method}"),
        *("~method_kwargs", f"+method_kwargs={kwargs}", "optimizer.weight_decay=5e-4"),
        *(f"augmentations=c2bin-{arguments.crop_size}", "scheduler.name=warmup_cosine"),
        *("+scheduler.warmup_epochs=0", f"+check_val_every_n_epoch={arguments.epochs}"),
    ]
    return [sys.executable, f"{scripts}/main_pretrain.py", *more, *common]


def checkpoint(pretrained: Path) -> Path:
    """Return the last checkpoint of the pretraining."""
    found = pretrained.resolve().glob("trained_models/*/*/*.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime)


def execute(arguments: list[str], work: Path, bar: Any) -> Path:
    """Run in `work` and show the last line of the output meanwhile; return the log's path."""
    log = work / "log.txt"
    with log.open("ab") as output:
        process = subprocess.Popen(arguments, cwd=work, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(1)
                bar.set_postfix_str(last_line(log), refresh=True)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise ExperimentError(f"{' '.join(arguments)} failed, see {log}:\n{tail}")
    return log


def last_line(log: Path) -> str:
    """Return the end of the last line of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 500))
        lines = re.split(r"[\r\n]", file.read().decode(errors="replace"))
    lines = [line.strip("\x1b[A ") for line in lines if line.strip()]
    return lines[-1][:60] if lines else ""


def metrics(work: Path) -> dict[str, float]:
    """Return the last value of everything that Lightning's logger wrote, over all restarts."""
    values: dict[str, float] = {}
    folders = (work / "lightning_logs").glob("version_*")
    for folder in sorted(folders, key=lambda path: int(path.name.partition("_")[2])):
        if (folder / "metrics.csv").exists():
            with (folder / "metrics.csv").open(newline="") as file:
                for row in csv.DictReader(file):
                    values |= {name: float(value) for name, value in row.items() if value}
        elif list(folder.glob("events.*")):
            # With TensorBoard installed, Lightning writes its files instead.
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            events = EventAccumulator(str(folder)).Reload()
            values |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    return values


def read_pretraining(log: Path) -> Result:
    """Return the online classifier and the scores of the heads."""
    found = {k: v for k, v in metrics(log.parent).items() if k.startswith("val_")}
    return {"online_acc1": found.pop("val_acc1"), "pretrain_metrics": found}


def read_linear(log: Path) -> Result:
    """Return the linear evaluation."""
    found = metrics(log.parent)
    return {"linear_acc1": found["val_acc1"], "linear_acc5": found["val_acc5"]}


def read_knn(log: Path) -> Result:
    """Return the nearest neighbours."""
    found = re.findall(r"Result: acc@1=([\d.]+), acc@5=([\d.]+)", log.read_text(errors="replace"))
    return {"knn_acc1": float(found[-1][0]), "knn_acc5": float(found[-1][1])}


def table(arguments: argparse.Namespace, results: dict[tuple[str, int], Result]) -> str:
    """Return one row per method; mean ± standard deviation where there are several seeds."""
    columns = {
        "linear": "linear_acc1",
        f"kNN k={arguments.k}": "knn_acc1",
        "online classifier": "online_acc1",
        "pretraining, s": "pretrain_seconds",
    }
    body = [
        [
            METHODS[method],
            *(
                mean_and_spread([results[method, s][key] for s in arguments.seeds], ".1f")
                for key in columns.values()
            ),
        ]
        for method in arguments.methods
    ]
    images = settings_of(arguments)
    c2bin = [results["c2bin", s] for s in arguments.seeds if "c2bin" in arguments.methods]
    return "\n\n".join(
        [
            markdown(["method", *columns], body),
            *heads_table([run["pretrain_metrics"] for run in c2bin]),
            f"{images['data']}, {images['images']['train']} training and "
            f"{images['images']['test']} test images; {arguments.backbone}, {arguments.epochs} "
            f"epochs, batch {arguments.batch_size * arguments.devices}, views of "
            f"{arguments.crop_size} pixels; {over_seeds(arguments.seeds)}. Accuracies in percent, "
            "on the test images.",
        ]
    )
