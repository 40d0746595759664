"""Run one of lightly's ImageNet benchmark scripts with C2BIN among its methods."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lightly.utils.benchmarking import KNNClassifier

from c2bin_lightly.benchmark import register

EPILOG = """\
example:
  python -m c2bin_lightly lightly/benchmarks/imagenet/resnet50/main.py --methods c2bin byol \\
      --train-dir imagenet/train --val-dir imagenet/val --epochs 100 --devices 8

What follows SCRIPT is the script's own; SCRIPT --help lists it.
"""


def clusters(text: str) -> tuple[int, ...]:
    """Return the numbers of clusters in a text such as 32,64,128."""
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 2:
        raise argparse.ArgumentTypeError(f"each head needs at least 2 clusters, got {text!r}")
    return numbers


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line up to the script; what follows is left as it is."""
    parser = argparse.ArgumentParser(
        prog="python -m c2bin_lightly",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--num-clusters", type=clusters, metavar="K,K,...", help="default: 512,1024,2048, Table 7")
    add("--against", choices=["runner", "follower"], help="whose clusters (default: runner)")
    add("--normalize", action="store_true", help="L2-normalised features for the heads")
    add("--no-online-knn", action="store_true", help="saves a pass over the bank every epoch")
    add("script", type=Path, metavar="SCRIPT", help="main.py of a lightly ImageNet benchmark")
    add("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    args = parser.parse_args(argv)
    if not args.script.is_file():
        parser.error(f"SCRIPT: there is no file {args.script}")
    return args


def load(script: Path) -> ModuleType:
    """Import a script that lies beside the modules that it imports."""
    folder = str(script.resolve().parent)
    sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(script.stem, script)
    if spec is None or spec.loader is None:
        raise SystemExit(f"python -m c2bin_lightly: error: {script} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Under its own name, so that loader workers that are spawned find what they are sent.
    sys.modules[script.stem] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"python -m c2bin_lightly: error: {script} needs {error.name}, which is not installed"
        ) from error
    return module


@contextlib.contextmanager
def quiet_nested_knn() -> Iterator[None]:
    """Keep lightly's kNN from logging where it is part of a method, as in lightly's own SimCLR.

    Lightning lets only the module that it trains log, and stops the run otherwise. The method logs
    what the kNN returns, so nothing is lost; a kNN that is evaluated by itself logs as before.
    """
    log_dict = KNNClassifier.log_dict

    def quiet(self: KNNClassifier, *args: Any, **kwargs: Any) -> None:
        if self.trainer.lightning_module is self:
            log_dict(self, *args, **kwargs)

    KNNClassifier.log_dict = quiet
    try:
        yield
    finally:
        KNNClassifier.log_dict = log_dict


def main(argv: Sequence[str] | None = None) -> None:
    """Register C2BIN with the script's methods, then run its main with its own arguments."""
    args = parse(argv)
    script: Any = load(args.script)
    missing = [name for name in ("METHODS", "main", "parser") if not hasattr(script, name)]
    if missing or not isinstance(script.METHODS, MutableMapping):
        raise SystemExit(
            f"python -m c2bin_lightly: error: {args.script} is no ImageNet benchmark of lightly: "
            f"it has no {' and no '.join(missing) or 'dict METHODS'}"
        )
    given = {"num_clusters": args.num_clusters, "against": args.against}
    options = {name: value for name, value in given.items() if value is not None}
    options["normalize"] = args.normalize
    register(script.METHODS, online_knn=not args.no_online_knn, **options)
    with quiet_nested_knn():
        script.main(**vars(script.parser.parse_args(args.arguments)))


if __name__ == "__main__":
    main()
