"""What makes solo-learn know the method and the paper's third backbone."""

from __future__ import annotations

from typing import Any

import torchvision
from solo.methods import METHODS
from solo.methods.base import BaseMethod
from torch import nn

from c2bin_solo.method import C2BIN

__all__ = ["register"]


def register() -> None:
    """Put C2BIN into `solo.methods.METHODS` as `"c2bin"`, and ResNet-34 among its backbones.

    ResNet-34 is what the paper clusters with (Table 10), and solo-learn has none. Calling this
    again changes nothing.

    Raises:
        ValueError: If solo-learn already has another method of that name.

    Examples:
        >>> from c2bin_solo import register
        >>> from solo.methods import METHODS
        >>> register()
        >>> METHODS["c2bin"].__name__
        'C2BIN'
    """
    known = METHODS.setdefault("c2bin", C2BIN)
    if known is not C2BIN:
        raise ValueError(
            "solo.methods.METHODS: expected no other method under 'c2bin', got "
            f"{known.__module__}.{known.__qualname__}"
        )
    BaseMethod._BACKBONES.setdefault("resnet34", _resnet34)


def _resnet34(method: str, *args: Any, **kwargs: Any) -> nn.Module:
    # solo-learn tells every backbone which method it is for.
    network: nn.Module = torchvision.models.resnet34(*args, **kwargs)
    return network
