"""Table 2: ImageNet with ResNet-50. The commands for a cluster, and a check on a few images."""

from __future__ import annotations

import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from c2bin_lightly import C2BINResNet50, load_backbone
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from PIL import Image
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as T  # noqa: N812 - as everybody calls it
from torchvision.datasets import ImageFolder
from torchvision.models import resnet50

from experiments.data import stratified
from experiments.evaluation import extract, linear_probe
from experiments.paper.published import TABLE2
from experiments.paper.report import Report
from experiments.paper.runs import Lab
from experiments.report import markdown
from experiments.store import ExperimentError

BATCH = 16
CHECK_IMAGES = {"train": 32, "val": 16}
# Pretraining with Table 7 and linear evaluation with Table 8, on 8 GPUs of 32 images each.
SOLO = """\
cd solo-learn
python main_pretrain.py --config-name c2bin-imagenet data.train_path=IMAGENET/train \\
    data.val_path=IMAGENET/val "devices=[0,1,2,3,4,5,6,7]" optimizer.batch_size=32
python main_linear.py --config-name c2bin-linear-imagenet data.train_path=IMAGENET/train \\
    data.val_path=IMAGENET/val "devices=[0,1,2,3,4,5,6,7]" optimizer.batch_size=32 \\
    'pretrained_feature_extractor="trained_models/c2bin/RUN/c2bin-imagenet-RUN-ep=199.ckpt"'"""
LIGHTLY = """\
python -m c2bin_lightly lightly/benchmarks/imagenet/resnet50/main.py --methods c2bin byol \\
    --train-dir IMAGENET/train --val-dir IMAGENET/val --epochs 200 --devices 8 \\
    --batch-size-per-device 32 --num-workers 8"""


def image_folder(lab: Lab) -> Path:
    """Return a folder {train,val}/<class>/ of a few of the images, written once."""
    images, folder = lab.images(), lab.out / "table2-images"
    for split, part in (("train", "train"), ("val", "test")):
        pixels, labels = getattr(images, part), getattr(images, f"{part}_labels")
        keep = stratified(labels, max(len(images.classes), CHECK_IMAGES[split]))
        for index in keep:
            # Numbered: a class name may hold what no file system takes.
            path = folder / split / f"class{int(labels[index]):03d}" / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                Image.fromarray(pixels[index].permute(1, 2, 0).numpy()).save(path)
    return folder


def check_module(lab: Lab, folder: Path) -> dict[str, Any]:
    """Train lightly's form of C2BIN on ResNet-50 for an epoch; evaluate its stored backbone."""
    size, classes = lab.images().size, len(list((folder / "train").iterdir()))
    normalize = {"mean": [0.5] * 3, "std": [0.5] * 3}
    views = BYOLTransform(
        BYOLView1Transform(input_size=size, gaussian_blur=0.0, normalize=normalize),
        BYOLView2Transform(input_size=size, gaussian_blur=0.0, normalize=normalize),
    )
    plain = T.Compose([T.ToTensor(), T.Normalize(**normalize)])
    torch.manual_seed(lab.seeds[0])
    model = C2BINResNet50(batch_size_per_device=BATCH, num_classes=classes)
    trainer = Trainer(
        accelerator=lab.args.accelerator,
        devices=1,
        precision=lab.args.precision,
        max_epochs=1,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train, val = (ImageFolder(str(folder / split), plain) for split in ("train", "val"))
    pairs = DataLoader(
        ImageFolder(str(folder / "train"), views), BATCH, shuffle=True, drop_last=True
    )
    with warnings.catch_warnings():
        # After two steps of 16 images, heads of up to 2048 clusters can be no others.
        warnings.filterwarnings("ignore", message="A head has .* clusters|Cluster head")
        trainer.fit(model, pairs, DataLoader(val, BATCH))
    checkpoint = folder / "c2bin.ckpt"
    trainer.save_checkpoint(checkpoint)
    net = resnet50()
    net.fc = nn.Identity()
    load_backbone(checkpoint, net)
    checkpoint.unlink()
    fitted, scored = (extract(net, DataLoader(part, BATCH)) for part in (train, val))
    probe = linear_probe(fitted, scored, lrs=(30.0,), epochs=5, seed=lab.seeds[0])
    return {
        "steps": trainer.global_step,
        "loss": float(trainer.callback_metrics["train_loss"]),
        "top-1 of the linear classifier": 100 * probe.accuracy,
    }


def run_script(command: list[str], where: Path | None, log: Path) -> None:
    """Run a host's script, its output in `log`; an error ends in the log's last lines."""
    print(f"running, output in {log}:\n  {' '.join(command)}", flush=True)
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command, cwd=where, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
        raise ExperimentError(f"{command[1]} ended with code {code}; the end of {log}:\n{last}")


def check_solo(lab: Lab, folder: Path) -> dict[str, Any]:
    """Run solo-learn's main_pretrain.py and main_linear.py with the configs of Tables 7 and 8."""
    out = (lab.out / "table2-solo").resolve()
    small = [f"optimizer.batch_size={BATCH}", "max_epochs=1", "data.dataset=custom"]
    small += [f"data.train_path={(folder / 'train').resolve()}", "data.num_workers=1"]
    small += [f"data.val_path={(folder / 'val').resolve()}", "data.format=image_folder"]
    small += ["auto_resume.enabled=False", "wandb.enabled=False", f"checkpoint.dir={out}"]
    if lab.args.accelerator == "cpu":
        small += ["accelerator=cpu", "strategy=auto", "precision=32", "sync_batchnorm=False"]
        small += ["devices='1'"]  # a string, of which solo-learn takes the length
    python = lab.args.solo_python
    pretrain = [python, "main_pretrain.py", "--config-name", "c2bin-imagenet", *small]
    pretrain += ["augmentations=c2bin-32"]
    run_script(pretrain, lab.args.solo, lab.out / "table2-solo-pretrain.log")
    found = sorted(out.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ExperimentError(f"main_pretrain.py left no checkpoint below {out}")
    linear = [python, "main_linear.py", "--config-name", "c2bin-linear-imagenet", *small]
    # Hydra would read the = of the file's name as a further override.
    linear += [f'pretrained_feature_extractor="{found[-1]}"']
    run_script(linear, lab.args.solo, lab.out / "table2-solo-linear.log")
    return {"output": "table2-solo-pretrain.log and table2-solo-linear.log"}


def table2(lab: Lab) -> Report:
    """Write the commands of the ImageNet runs, and check their way on a few images."""
    folder = image_folder(lab)
    checks = {"C2BINResNet50 in this process": check_module}
    if lab.args.solo:
        checks["solo-learn's main_pretrain.py and main_linear.py"] = check_solo
    found: dict[str, dict[str, Any]] = {}
    for name, check in checks.items():
        began = time.perf_counter()
        result = check(lab, folder)
        found[name] = {"seconds": round(time.perf_counter() - began, 1), **result}
        print(f"checked: {name}, {found[name]['seconds']} s", flush=True)
    table = markdown(
        ["method", "epochs", "batch", "top-1, paper", "top-1, ours"],
        [[m, str(e), str(b), f"{top1:.1f}", "not run"] for m, e, b, top1 in TABLE2],
    )
    body = [
        [name, str(result["seconds"]), ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in result.items() if key != "seconds")]
        for name, result in found.items()
    ]  # fmt: skip
    how = (
        f"The check takes {CHECK_IMAGES['train']} training images or one of each class through "
        "training, the stored checkpoint and a linear classifier; its accuracy means nothing. "
        "`--solo FOLDER` checks the same way through solo-learn's own scripts and Tables 7 and 8."
    )
    parts = [
        table,
        "With solo-learn, Tables 7 and 8 of the paper to the letter (IMAGENET: your folder):",
        f"```\n{SOLO}\n```",
        "With lightly, whose optimiser (LARS, cosine) and 90 epochs of linear evaluation take the "
        "place of Table 7's and 8's, alike for BYOL and C2BIN:",
        f"```\n{LIGHTLY}\n```",
        markdown(["checked", "seconds", "result"], body, left=(0, 2)),
        how,
    ]
    return Report("Table 2: ImageNet, ResNet-50", parts, found, unsure=["table2", "table7"])
