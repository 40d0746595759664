"""Take the backbone out of a training checkpoint: all of it, or an error that says what differs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_backbone"]

_LISTED = 8


def load_backbone(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    backbone: nn.Module,
    *,
    prefix: str = "backbone.",
    weights_only: bool = True,
) -> nn.Module:
    """Load the backbone's weights out of a checkpoint of solo-learn, lightly or PyTorch Lightning.

    Every parameter and buffer of `backbone` must be in the checkpoint under `prefix`, with the same
    shape, and nothing else may be there under it. Otherwise nothing is loaded.

    Args:
        checkpoint: The path of a checkpoint, or what `torch.load` made of one: a state dict, or a
            mapping that holds one under `"state_dict"`.
        backbone: The module to load into, built as for training. Both hosts train backbones without
            their classifier: for a torchvision ResNet set `backbone.fc = nn.Identity()` first.
        prefix: What names of the backbone's weights start with. The runner is `"backbone."` in
            every method of both hosts; the follower is `"momentum_backbone."` in solo-learn,
            `"teacher_backbone."` in lightly's BYOL benchmark and `"follower_backbone."` in
            `c2bin_lightly`.
        weights_only: As in `torch.load`. False unpickles arbitrary objects, which can run any
            code: only for files you trust.

    Returns:
        `backbone`, with the weights loaded; its device, dtype and mode stay as they were.

    Raises:
        TypeError: If an argument has the wrong type.
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read as a checkpoint, if no weight starts with `prefix`,
            or if weights are missing, unexpected or of another shape. The message lists them, and
            the prefixes that would fit: `torch.compile` and data-parallel wrappers put
            `"_orig_mod."` and `"module."` into the names.

    Examples:
        >>> from torch import nn
        >>> trained = nn.Linear(4, 2)
        >>> checkpoint = {"state_dict": {"backbone.weight": trained.weight.detach(),
        ...                              "backbone.bias": trained.bias.detach(),
        ...                              "projector.weight": torch.zeros(3, 2)}}
        >>> backbone = load_backbone(checkpoint, nn.Linear(4, 2))
        >>> torch.equal(backbone.weight, trained.weight)
        True
        >>> load_backbone(checkpoint, nn.Linear(4, 2, bias=False))
        Traceback (most recent call last):
            ...
        ValueError: checkpoint: the weights under 'backbone.' do not fit the backbone, Linear;
            unexpected (1): bias
    """
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone: expected a torch.nn.Module, got {type(backbone).__name__}")
    weights = _weights(checkpoint, weights_only)
    found = {
        name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)
    }
    wanted = backbone.state_dict()
    if not found:
        starts = sorted({name.partition(".")[0] + "." for name in weights})
        raise ValueError(
            f"checkpoint: expected weights whose names start with {prefix!r}, "
            f"got names that start with {_list(starts)}{_advice(weights, wanted)}"
        )
    given = _shapes(found)
    shapes = [
        f"{name} {tuple(given[name])} instead of {tuple(shape)}"
        for name, shape in _shapes(wanted).items()
        if given.get(name, shape) != shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": shapes,
    }
    listed = [f"{kind} ({len(names)}): {_list(names)}" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(
            f"checkpoint: the weights under {prefix!r} do not fit the backbone, "
            f"{type(backbone).__name__}; " + "; ".join(listed) + _advice(weights, wanted)
        )
    backbone.load_state_dict(found)
    return backbone


def _weights(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any], weights_only: bool
) -> dict[str, Any]:
    content: Any = checkpoint
    if isinstance(checkpoint, (str, os.PathLike)):
        path = os.fspath(checkpoint)
        if not os.path.exists(path):
            raise FileNotFoundError(f"checkpoint: there is no file {path}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=weights_only)
        except pickle.UnpicklingError as error:
            advice = (
                "it holds objects other than weights and plain types, or is no checkpoint; "
                "if you trust the file, weights_only=False reads it"
                if weights_only
                else "it is no checkpoint"
            )
            raise ValueError(f"checkpoint: cannot read {path}: {advice} ({error})") from error
        except (EOFError, OSError, RuntimeError) as error:
            raise ValueError(f"checkpoint: cannot read {path}: {error}") from error
    if not isinstance(content, Mapping):
        raise TypeError(
            "checkpoint: expected a path, a state dict or a mapping that holds one under "
            f"'state_dict', got {type(content).__name__}"
        )
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise TypeError(
            f"checkpoint: expected a mapping under 'state_dict', got {type(state).__name__}"
        )
    return {
        str(name): value
        for name, value in state.items()
        # What a module's `get_extra_state` returns can be anything.
        if isinstance(value, Tensor) or str(name).endswith("_extra_state")
    }


def _advice(weights: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Name the prefixes under which the checkpoint holds just the weights wanted."""
    shapes, given = _shapes(wanted), _shapes(weights)
    if not shapes:
        return ""
    first = next(iter(shapes))
    ends = [name[: -len(first)] for name in given if name.endswith(first)]
    fitting = [
        repr(start)
        for start in ends
        if {name[len(start) :]: s for name, s in given.items() if name.startswith(start)} == shapes
    ]
    return f"; it would fit with prefix={' or '.join(fitting)}" if fitting else ""


def _shapes(weights: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items() if isinstance(value, Tensor)}


def _list(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    shown = ", ".join(names[:_LISTED]) or "nothing"
    return shown + (f" and {more} more" if more > 0 else "")
