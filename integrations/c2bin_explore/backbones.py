"""Backbones for small images, without their classifiers."""

from __future__ import annotations

import itertools

import torch
import torchvision
from torch import Tensor, nn

__all__ = ["backbone"]

# Up to this size ImageNet's stem would shrink images fourfold before the first stage.
_SMALL = 64


class _Residual(nn.Module):
    """Two 3 × 3 convolutions and a skip connection."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def backbone(name: str, size: int, *, pooled: bool = False) -> tuple[nn.Module, int]:
    """Return a fresh backbone for images of `size` pixels, and the length of its features.

    Args:
        name: `"small"`, nine 3 × 3 convolutions for a CPU, or a ResNet of torchvision such as
            `"resnet18"`, which gets the usual 3 × 3 stem for images of up to 64 pixels.
        size: Side of the images in pixels.
        pooled: Halve the resolution once more in the stem of `"small"`, for larger images.

    Returns:
        A module that maps images (n, 3, size, size) to features (n, d), and d.

    Examples:
        >>> net, features = backbone("small", size=32)
        >>> net(torch.rand(2, 3, 32, 32)).shape, features
        (torch.Size([2, 192]), 192)
    """
    if name == "small":
        widths = (24, 24, 48, 96, 192)
        stem: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 3, 2, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        ]
        if pooled:
            stem.append(nn.MaxPool2d(2))
        stages = [_Residual(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
        return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()), widths[-1]
    net = getattr(torchvision.models, name)()
    features: int = net.fc.in_features
    net.fc = nn.Identity()
    if size <= _SMALL:
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()
    return net, features
