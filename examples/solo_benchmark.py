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
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

METHODS = {"simclr": "SimCLR", "mocov2plus": "MoCo v2+", "byol": "BYOL", "c2bin": "C2BIN"}
STAGES = ("pretrain", "linear", "knn")
# The widths of the paper's Table 5 for all; temperatures and momentum of solo-learn's recipes.
PROJECTOR = {"proj_hidden_dim": 512, "proj_output_dim": 512}
BOOTSTRAP = {**PROJECTOR, "pred_hidden_dim": 512}
PACKAGES = ("c2bin-ext", "solo-learn", "lightning", "torch", "torchvision", "timm", "torchmetrics")


class BenchmarkError(Exception):
    """What to tell the user, without a traceback."""


def main() -> None:
    arguments = parse()
    # A scheduler's stop is Ctrl-C: else the script that is running would go on alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(arguments)
    except BenchmarkError as error:
        raise SystemExit(f"solo_benchmark.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. The same command goes on from here.") from None


def parse() -> argparse.Namespace:
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
    add("--smoke", action="store_true", help="seconds of training on random images")
    arguments = parser.parse_args()
    if not (arguments.solo_learn / "main_pretrain.py").is_file():
        parser.error(f"--solo-learn: there is no main_pretrain.py in {arguments.solo_learn}")
    if arguments.smoke:
        arguments.data, arguments.data_name = arguments.out / "images", "random images"
        arguments.epochs = arguments.linear_epochs = 1
        arguments.crop_size, arguments.batch_size, arguments.queue_size = 32, 8, 32
        arguments.clusters, arguments.k, arguments.workers = [4, 8], 5, 0
        draw_images(arguments.data)
    elif arguments.data is None:
        parser.error("--data: expected a folder with train/ and test/")
    for split in ("train", "test"):
        if not (arguments.data / split).is_dir():
            parser.error(f"--data: there is no folder {arguments.data / split}")
    if arguments.queue_size % arguments.batch_size:
        parser.error("--queue-size: expected a multiple of --batch-size")
    return arguments


def draw_images(folder: Path) -> None:
    """Five classes, as many as main_linear needs, of 8 and 2 noise images of their brightness."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for label in range(5):
            target = folder / split / f"class{label}"
            target.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = draw.integers(45 * label, 45 * label + 75, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{number}.png")


def run(arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    fingerprint = arguments.out / "settings.json"
    if fingerprint.exists() and json.loads(fingerprint.read_text()) != settings:
        raise BenchmarkError(f"{fingerprint} has other settings: give another --out")
    fingerprint.write_text(json.dumps(settings, indent=2) + "\n")

    runs = [(m, s) for s in arguments.seeds for m in arguments.methods]
    stages = [(m, s, stage) for m, s in runs for stage in STAGES]
    results: dict[tuple[str, int], dict[str, Any]] = {pair: {} for pair in runs}
    with tqdm(stages, unit="stage") as bar:
        for method, seed, stage in bar:
            bar.set_description(f"{METHODS[method]}, seed {seed}, {stage}")
            folder = arguments.out / f"{method}-seed{seed}"
            results[method, seed] |= stage_result(arguments, folder, method, seed, stage, bar)

    report = {
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "hardware": hardware(arguments),
        "runs": [{"method": m, "seed": s, **results[m, s]} for m, s in runs],
    }
    (arguments.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    text = table(arguments, results)
    (arguments.out / "results.md").write_text(text)
    print(text)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on; no path, so that results can be published."""
    skipped = {"solo_learn", "data", "out", "workers", "methods", "seeds", "data_name"}
    settings = {k: v for k, v in sorted(vars(arguments).items()) if k not in skipped}
    counts = {
        split: sum(path.is_file() for path in (arguments.data / split).glob("*/*"))
        for split in ("train", "test")
    }
    return {"data": arguments.data_name or arguments.data.name, "images": counts, **settings}


def stage_result(
    arguments: argparse.Namespace, folder: Path, method: str, seed: int, stage: str, bar: Any
) -> dict[str, Any]:
    """Run one script of solo-learn, or read what an earlier call wrote when it had finished."""
    done = folder / f"{stage}.json"
    if done.exists():
        content: dict[str, Any] = json.loads(done.read_text())
        return content
    work = folder / stage
    work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    log = execute(command(arguments, folder, method, seed, stage), work, bar)
    seconds = round(time.perf_counter() - start, 1)
    read = {"pretrain": read_pretraining, "linear": read_linear, "knn": read_knn}[stage]
    result = read(log) | {f"{stage}_seconds": seconds}
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(done)
    return result


def command(
    arguments: argparse.Namespace, folder: Path, method: str, seed: int, stage: str
) -> list[str]:
    data = arguments.data.resolve()
    # The launcher, because main_knn asks for CUDA by name; the other two are started as they are.
    scripts = arguments.solo_learn.resolve()
    if stage == "knn":
        return [
            *(sys.executable, "-m", "c2bin_solo", f"{scripts}/main_knn.py"),
            *("--dataset", "custom", "--k", str(arguments.k), "--distance_function", "cosine"),
            *("--temperature", "0.07", "--feature_type", "backbone"),
            *("--train_data_path", f"{data}/train", "--val_data_path", f"{data}/test"),
            *("--batch_size", str(arguments.batch_size), "--num_workers", str(arguments.workers)),
            *("--pretrained_checkpoint_dir", str(checkpoint(folder).parent)),
        ]
    linear = stage == "linear"
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
            f"pretrained_feature_extractor='{checkpoint(folder)}'",
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


def checkpoint(folder: Path) -> Path:
    """The last checkpoint of the pretraining below `folder`."""
    found = (folder / "pretrain").resolve().glob("trained_models/*/*/*.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime)


def execute(arguments: list[str], work: Path, bar: Any) -> Path:
    """Run in `work`, show the last line of the output meanwhile; the log's path."""
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
        raise BenchmarkError(f"{' '.join(arguments)} failed, see {log}:\n{tail}")
    return log


def last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 500))
        lines = re.split(r"[\r\n]", file.read().decode(errors="replace"))
    lines = [line.strip("\x1b[A ") for line in lines if line.strip()]
    return lines[-1][:60] if lines else ""


def metrics(work: Path) -> dict[str, float]:
    """The last value of everything that Lightning's logger wrote, over all restarts."""
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


def read_pretraining(log: Path) -> dict[str, Any]:
    found = {k: v for k, v in metrics(log.parent).items() if k.startswith("val_")}
    return {"online_acc1": found.pop("val_acc1"), "pretrain_metrics": found}


def read_linear(log: Path) -> dict[str, Any]:
    found = metrics(log.parent)
    return {"linear_acc1": found["val_acc1"], "linear_acc5": found["val_acc5"]}


def read_knn(log: Path) -> dict[str, Any]:
    found = re.findall(r"Result: acc@1=([\d.]+), acc@5=([\d.]+)", log.read_text(errors="replace"))
    return {"knn_acc1": float(found[-1][0]), "knn_acc5": float(found[-1][1])}


def hardware(arguments: argparse.Namespace) -> dict[str, Any]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    return {
        "gpu": names,
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "processes": arguments.devices,
    }


def table(arguments: argparse.Namespace, results: dict[tuple[str, int], dict[str, Any]]) -> str:
    """One row per method; mean ± standard deviation where there are several seeds."""
    columns = {
        "linear": "linear_acc1",
        f"kNN k={arguments.k}": "knn_acc1",
        "online classifier": "online_acc1",
        "pretraining, s": "pretrain_seconds",
    }
    lines = [f"| method | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for method in arguments.methods:
        cells = []
        for key in columns.values():
            values = [results[method, seed][key] for seed in arguments.seeds]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}")
        lines.append(f"| {METHODS[method]} | {' | '.join(cells)} |")
    if "c2bin" in arguments.methods:
        scores = ("nmi", "acc", "purity", "ari", "clusters_in_use", "effective_clusters")
        lines += ["", f"| C2BIN's heads | {' | '.join(scores)} | agreement |"]
        lines += ["| --- |" + " ---: |" * (len(scores) + 1)]
        for head, k in enumerate(arguments.clusters):
            cells = []
            for score in (*scores, "agreement"):
                key = f"val_{score}_{head}_of_{k}"
                found = [results["c2bin", s]["pretrain_metrics"][key] for s in arguments.seeds]
                cells.append(f"{statistics.fmean(found):.3g}")
            lines.append(f"| K = {k} | {' | '.join(cells)} |")
    images = settings_of(arguments)
    lines += [
        "",
        f"{images['data']}, {images['images']['train']} training and {images['images']['test']} "
        f"test images; {arguments.backbone}, {arguments.epochs} epochs, batch "
        f"{arguments.batch_size * arguments.devices}, views of {arguments.crop_size} pixels; seeds "
        f"{', '.join(map(str, arguments.seeds))}. Accuracies in percent, on the test images.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
