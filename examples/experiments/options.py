"""Options that several commands take, which images and which machine, and their checks."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.data import TORCHVISION
from experiments.store import ExperimentError

BACKBONES = ("small", "resnet18", "resnet34", "resnet50")
PRETRAINED = "efficientnet-lite0, torchvision:NAME or timm:NAME"
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def backbone_name(text: str) -> str:
    """Return a name of `BACKBONES`, which start from random weights, or of a pretrained network."""
    if text in BACKBONES or text.startswith("efficientnet-lite") or ":" in text:
        return text
    raise argparse.ArgumentTypeError(
        f"expected {', '.join(BACKBONES)} or, pretrained, {PRETRAINED}, got {text!r}"
    )


def add_backbone(add: Callable[..., Any]) -> None:
    """Add the option --backbone."""
    text = f"{', '.join(BACKBONES)} or, pretrained, {PRETRAINED} (default: small, for CPUs)"
    add("--backbone", type=backbone_name, default="small", metavar="NAME", help=text)


def parser_of(doc: str, out: str, images: str, workers: str, **more: Any) -> Any:
    """Return a parser with what every command takes: which images, which machine, where to.

    Args:
        doc: The description.
        out: Where results go by default.
        images: Which images are the default, in words.
        workers: What --workers means, in words.
        **more: Of `ArgumentParser`.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=form, allow_abbrev=False, **more
    )
    add = parser.add_argument_group("images").add_argument
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="images of your own: FOLDER/{train,test}/<class>/<image>, or FOLDER/<class>/<image>",
    )
    add("--dataset", choices=["digits", *TORCHVISION], help=f"default: {images}")
    add("--data-root", type=Path, default=Path("data"), help="for downloads (default: ./data)")
    add(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="images become squares of it (default: digits 16, stl10 64, others 32)",
    )
    add("--skip-corrupt", action="store_true", help="leave unreadable images out, do not stop")
    add("--limit", type=int, metavar="N", help="train on at most N images, stratified")
    add("--limit-test", type=int, metavar="N", help="test on at most N images, stratified")
    add = parser.add_argument_group("machine").add_argument
    add("--accelerator", choices=["auto", "cpu", "gpu"], default="auto", help="default: auto")
    add("--precision", choices=PRECISIONS, help="default: bf16-mixed on a GPU, 32-true on a CPU")
    add("--workers", type=int, help=workers)
    add(
        "--tensor-views",
        dest="views",
        action="store_const",
        const="tensors",
        help="make views in batches on tensors, on the device that trains: what a GPU wants",
    )
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path(out), help=f"default: {out}")
    add(
        "--overwrite",
        action="store_true",
        help="replace a table that other settings made; trained runs are kept either way",
    )
    # What only some commands let people choose.
    parser.set_defaults(validation=0, curves=False, devices=1, processes=1, keep=False)
    parser.set_defaults(views="made", channels_last=False, data_name=None)
    return parser


def settle(
    parser: argparse.ArgumentParser, args: argparse.Namespace, default: str, **bounds: int
) -> None:
    """Set what is left to us; end with the parser's message if an option contradicts another.

    Args:
        parser: Of the command.
        args: What it read.
        default: The images, if none are asked for.
        **bounds: The least value of further options.
    """
    if args.data and args.dataset:
        parser.error("--data and --dataset exclude each other")
    args.dataset = args.dataset or ("folder" if args.data else default)
    least = {"limit": 1, "limit_test": 1, "image_size": 8, "workers": 0}
    for name, bound in {**least, **bounds}.items():
        value = getattr(args, name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each < bound:
                parser.error(f"--{name.replace('_', '-')} must be at least {bound}, got {each}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds must be different whole numbers, 0 or more")
    gpus = torch.cuda.device_count()
    if args.accelerator == "auto":
        args.accelerator = "gpu" if gpus else "cpu"
    if args.accelerator == "gpu" and gpus < args.devices:
        parser.error(f"--accelerator gpu, devices {args.devices}, but torch sees {gpus} GPUs")
    if args.precision is None:
        args.precision = "bf16-mixed" if args.accelerator == "gpu" else "32-true"


def first_process() -> bool:
    """Say whether this process writes and speaks: each further device's runs the same script."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def quieten(tables: bool = False) -> None:
    """Silence Lightning where these programs have measured or reported for themselves.

    Args:
        tables: Also what a table of many settings shows: too many clusters, features all alike.
    """
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Advice about loaders that read memory or were timed here, and Lightning's own use of a
    # function that torch is about to drop.
    ignored = [r".*does not have many workers.*", r".*LeafSpec.*"]
    if tables:
        ignored += ["A head has .* clusters but a global batch", "Number of distinct clusters"]
    for message in ignored:
        warnings.filterwarnings("ignore", message=message)


def exit_code(name: str, call: Callable[[], int | None], out: Path) -> int:
    """Return the exit code of a call: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        return call() or 0
    except ExperimentError as error:
        code, said = 2, f"{name}: error: {error}"
    except KeyboardInterrupt:
        on = "the same command goes on from there, in what is unfinished after its last whole epoch"
        code, said = 130, f"\nInterrupted. Finished runs are kept in {out}; {on}."
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if first_process():
        print(said, file=sys.stderr)
    return code
