"""`python -m c2bin_solo <script of solo-learn> <its arguments>`: the script, with C2BIN known."""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from c2bin_solo import register

__all__ = ["main"]

_USAGE = "usage: python -m c2bin_solo <path of a solo-learn script, main_*.py> [its arguments]"
_NAMES_CUDA = ("main_knn.py", "main_umap.py")


class _CUDAMeansCPU(TorchFunctionMode):
    """Tensors that are sent to a CUDA device stay on the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(map(_on_cpu, args))
            kwargs = {name: _on_cpu(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    named = isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"
    return torch.device("cpu") if named else value


def main(arguments: Sequence[str]) -> None:
    """Run a script of solo-learn with C2BIN registered.

    main_knn.py and main_umap.py ask for CUDA by name; on a machine that has none they run on the
    CPU.

    Args:
        arguments: The script's path, then its own arguments.

    Raises:
        SystemExit: If there is no such script.
    """
    if not arguments or not Path(arguments[0]).is_file():
        given = f"there is no file {arguments[0]}" if arguments else "no script was given"
        raise SystemExit(f"{given}\n{_USAGE}")
    script = Path(arguments[0]).resolve()
    # Where Python itself looks first when it runs a script.
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments[1:]]
    register()
    cpu = script.name in _NAMES_CUDA and not torch.cuda.is_available()
    with _CUDAMeansCPU() if cpu else contextlib.nullcontext():
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
