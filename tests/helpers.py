"""What several tests observe of a call: the operators it runs, and the numbers it reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """The operator and the shape of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.seen.append((func.__name__, tuple(value.shape)))
        return result


class Collectives(TorchDispatchMode):
    """The collectives, however they are spelled, and how many numbers they carry."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace and "wait" not in func.__name__:
            self.calls.append(func.__name__)
            carried = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.numbers += sum(t.numel() for t in carried if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def signature(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Names and defaults of the parameters, in order, without `self`."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.name != "self"]


def shuffle(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
