"""Options that several programs here take, which images and which machine, and their checks."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from _demo_data import TORCHVISION, DemoError

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def add_images(parser: argparse.ArgumentParser, default: str) -> None:
    """Add what says which images: --data, --dataset, --data-root, --image-size, --skip-corrupt."""
    add = parser.add_argument_group("images").add_argument
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="images of your own: FOLDER/{train,test}/<class>/<image>, or FOLDER/<class>/<image>",
    )
    add("--dataset", choices=["digits", *TORCHVISION], help=f"default: {default}")
    add("--data-root", type=Path, default=Path("data"), help="for downloads (default: ./data)")
    add(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="images become squares of it (default: digits 16, stl10 64, others 32)",
    )
    add("--skip-corrupt", action="store_true", help="leave unreadable images out, do not stop")


def add_machine(parser: argparse.ArgumentParser, workers: str) -> argparse._ArgumentGroup:
    """Add --accelerator, --precision and --workers; return their group, for more of the kind."""
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--accelerator", choices=["auto", "cpu", "gpu"], default="auto", help="default: auto")
    add("--precision", choices=PRECISIONS, help="default: bf16-mixed on a GPU, 32-true on a CPU")
    add("--workers", type=int, help=workers)
    return group


def settle_images(
    parser: argparse.ArgumentParser, args: argparse.Namespace, default: str = "digits"
) -> None:
    """End with the parser's message unless at most one source is given; set `args.dataset`."""
    if args.data and args.dataset:
        parser.error("--data and --dataset exclude each other")
    args.dataset = args.dataset or ("folder" if args.data else default)


def settle_machine(
    parser: argparse.ArgumentParser, args: argparse.Namespace, devices: int = 1
) -> None:
    """End with the parser's message if there are too few GPUs; set accelerator and precision."""
    gpus = torch.cuda.device_count()
    if args.accelerator == "auto":
        args.accelerator = "gpu" if gpus else "cpu"
    if args.accelerator == "gpu" and gpus < devices:
        parser.error(f"--accelerator gpu, devices {devices}, but torch sees {gpus} GPUs")
    if args.precision is None:
        args.precision = "bf16-mixed" if args.accelerator == "gpu" else "32-true"


def at_least(
    parser: argparse.ArgumentParser, args: argparse.Namespace, bounds: dict[str, int]
) -> None:
    """End with the parser's message if an option, where given, is below its bound."""
    for name, bound in bounds.items():
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        for value in values:
            if value is not None and value < bound:
                parser.error(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")


def distinct_seeds(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the parser's message unless the seeds are different whole numbers."""
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds must be different whole numbers, 0 or more")


def quieten() -> None:
    """Silence Lightning where these programs have measured or reported for themselves."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Advice about loaders that read memory or were timed here, and Lightning's own use of a
    # function that torch is about to drop.
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*", module=r"pytorch_lightning.*")


def exit_code(name: str, call: Callable[[], None], out: Path) -> int:
    """Return the exit code of a call: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        call()
    except DemoError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. Finished runs are kept in {out}; the same command goes on from there, "
            "in what is unfinished after its last whole epoch.",
            file=sys.stderr,
        )
        return 130
    return 0
