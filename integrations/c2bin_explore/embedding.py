"""From images to features: networks, random views, files of features, and what clusters them."""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from c2bin_explore.backbones import backbone
from c2bin_explore.images import Array, ExploreError, shown
from c2bin_explore.networks import IMAGENET, Network, WeightsError, load, read_weights
from c2bin_ext.clustering import C2BINClustering
from c2bin_ext.heads import MultiScaleClusterHead

SCRATCH = "scratch:"
# Of images: on a CPU few, whose activations stay in its caches, which at 224 px takes two thirds of
# the time of 64.
_BATCH, _BATCH_ON_CPU = 256, 16
_KEY = "c2bin_explore"
# Convolutional networks see images of up to this side enlarged to that, and not to their own size,
# which would take five times as long and shows no more.
_SMALL, _ENLARGED = 64, 96


def view(images: Tensor) -> Tensor:
    """Return one random view of each image: crop, flip, colour, grey; SimCLR's, a batch at a time.

    Args:
        images: uint8 (n, 3, S, S).

    Returns:
        float32 (n, 3, S, S), in [0, 1].
    """
    n, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, device=device).uniform_(low, high)

    area, ratio = uniform(0.2, 1.0).sqrt(), uniform(math.log(3 / 4) / 2, math.log(4 / 3) / 2).exp()
    width, height = (area * ratio).clamp(max=1), (area / ratio).clamp(max=1)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = width * (2 * torch.randint(2, (n,), device=device) - 1)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * uniform(-1, 1)
    theta[:, 1, 2] = (1 - height) * uniform(-1, 1)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    x = grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)

    # Colour in YIQ: a factor of luma and its contrast, a factor and a rotation of the two chromas.
    to_yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]],
        device=device,
    )
    jittered = (uniform(0, 1) < 0.8).float()

    def jitter(low: float, high: float) -> Tensor:
        return (1 + jittered * (uniform(low, high) - 1)).view(n, 1, 1, 1)

    luma, chroma = torch.einsum("ij,njhw->nihw", to_yiq, x).tensor_split([1], dim=1)
    mean = luma.mean(dim=(2, 3), keepdim=True)
    luma = jitter(0.6, 1.4) * (mean + jitter(0.6, 1.4) * (luma - mean))
    coloured = (uniform(0, 1) < 0.8).float()
    angle = jittered * uniform(-0.1, 0.1) * 2 * math.pi
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    chroma = torch.einsum("nij,njhw->nihw", turn * coloured.view(n, 1, 1), chroma)
    chroma = chroma * jitter(0.8, 1.2)
    from_yiq = torch.linalg.inv(to_yiq.cpu()).to(device)
    x = torch.einsum("ij,njhw->nihw", from_yiq, torch.cat([luma, chroma], dim=1))
    return x.clamp(0, 1)


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return images (n, 3, S, S) in [0, 1] less the mean of each channel, over its deviation."""
    low, scale = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images - low) / scale


@dataclass(frozen=True)
class Embedder:
    """A network at one image size, and how many random views of each image it sees as well."""

    name: str
    network: Network
    size: int
    views: int
    device: str = "cpu"

    @property
    def crop(self) -> float:
        """Share of the shorter side that is seen: the network's own at its own size, else all."""
        return self.network.crop if self.size == self.network.size else 1.0

    def digest(self) -> str:
        """Return a digest of all that features depend on, besides images."""
        about = (self.name, self.size, self.views, self.crop, self.network[1:])
        digest = hashlib.sha256(repr(about).encode())
        for value in self.network.features.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, squares: npt.NDArray[np.uint8]) -> Array:
        """Return features (n, 1 + views, d), float16, of images uint8 (n, S, S, 3)."""
        module = self.network.features.to(self.device)
        module = module.to(memory_format=torch.channels_last)
        parts = []
        size = _BATCH_ON_CPU if torch.device(self.device).type == "cpu" else _BATCH
        with torch.random.fork_rng():
            # The same images have the same views, whatever was embedded before.
            torch.manual_seed(zlib.crc32(squares.tobytes()))
            for batch in torch.split(torch.from_numpy(squares), size):
                images = batch.permute(0, 3, 1, 2).to(self.device)
                seen = [images.float() / 255, *(view(images) for _ in range(self.views))]
                rows = [
                    module(
                        normalized(x, self.network.mean, self.network.std).contiguous(
                            memory_format=torch.channels_last
                        )
                    )
                    for x in seen
                ]
                parts.append(torch.stack(rows, dim=1).float().cpu())
        # Half precision ends at 65,504.
        return torch.cat(parts).clamp(-6e4, 6e4).half().numpy()


def pretrained(
    name: str, weights: Path | None, size: int | None, side: float, views: int, device: str
) -> Embedder:
    """Return the embedder of a named network.

    Args:
        name: See `networks.load`.
        weights: A file; None: the published ones.
        size: Side in px of what the network sees; None: its own, less where images are small.
        side: Shorter side in px that images typically have.
        views: Random views of each image.
        device: Of torch.
    """
    network = load(name, size, weights or "published")
    if size is None:
        small = network.any_size and side <= _SMALL
        size = min(_ENLARGED, network.size) if small else network.size
    return Embedder(name, network, size, views, device)


def scratch(name: str, size: int, views: int, device: str, seed: int = 0) -> Embedder:
    """Return an embedder that is yet to be trained on images of `size` px."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Unpooled, the first stage of a larger image would cost more than all of a 32 px network.
        features, _ = backbone(name, size, pooled=size > 40)
    network = Network(features.eval(), *IMAGENET, "none: random weights", size, 1.0)
    return Embedder(SCRATCH + name, network, size, views, device)


def cluster(
    features: Array,
    views: Array | None,
    scales: Sequence[int],
    seed: int,
    device: str,
    tell: Callable[[int, int], None],
) -> C2BINClustering:
    """Return C2BIN's clusters of features (n, d), and views (v, n, d) if there are any."""
    model = C2BINClustering(tuple(scales), random_state=seed, device=device)
    return model.fit(features, views=views, callback=lambda epoch, _: tell(epoch, model.max_epochs))


def save(path: Path, embedder: Embedder | None, clustering: C2BINClustering) -> None:
    """Write what `restore` needs for other images: the network, if there was one, and the heads."""
    about = {"scales": list(clustering.head_.num_clusters), "features": clustering.n_features_in_}
    content: dict[str, Any] = {
        "mean": torch.from_numpy(clustering.mean_),
        "components": torch.from_numpy(np.ascontiguousarray(clustering.components_)),
        "head": clustering.head_.state_dict(),
    }
    if embedder is not None:
        about |= {"network": embedder.name, "size": embedder.size}
        state = embedder.network.features.state_dict()
        content["state_dict"] = {f"backbone.{k}": v.detach().cpu() for k, v in state.items()}
    torch.save({**content, _KEY: about}, path)


def restore(path: Path, device: str) -> tuple[Embedder | None, C2BINClustering]:
    """Return what a file holds that `save` wrote.

    Raises:
        ExploreError: If there is no such file, or it is another program's.
    """
    where = f"--checkpoint {shown(str(path))}"
    if not path.is_file():
        raise ExploreError(f"--checkpoint: there is no file {shown(str(path))}")
    try:
        content = read_weights(path)
        about = content[_KEY]
        clustering = C2BINClustering(tuple(about["scales"]))
        clustering.mean_ = content["mean"].numpy()
        clustering.components_ = content["components"].numpy()
        clustering.n_features_in_ = about["features"]
        # Where k-means was kept, the head has no hidden layer.
        hidden = any(name.startswith("hidden.") for name in content["head"])
        clustering.head_ = MultiScaleClusterHead(
            clustering.components_.shape[1],
            about["scales"],
            hidden_features=clustering.hidden_features if hidden else None,
        )
        clustering.head_.double().eval().load_state_dict(content["head"])
        if "network" not in about:
            return None, clustering
        name, size = about["network"], about["size"]
        embedder = (
            scratch(name.removeprefix(SCRATCH), size, 0, device)
            if name.startswith(SCRATCH)
            else Embedder(name, load(name, size, "none"), size, 0, device)
        )
        state = {k.removeprefix("backbone."): v for k, v in content["state_dict"].items()}
        embedder.network.features.load_state_dict(state)
    except WeightsError as error:
        raise ExploreError(f"{where} does not fit: {error}") from error
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ExploreError(
            f"{where} does not fit: expected the model.ckpt that this command wrote beside a page"
        ) from error
    return embedder, clustering


# The row of each path, features (n, d), and views (v, n, d) if there are any.
Table = tuple[dict[str, int], Array, Array | None]


def read_features(path: Path) -> Table:
    """Return the row of each path, features (n, d), and views (v, n, d) if there are any.

    Args:
        path: An .npz with the arrays `names` and `features`, and `views` if there are any; an .npy
            of features with a text file beside it, NAME.txt, of a name a line; or a .parquet with
            a column of text, the names, and either one column of lists or columns of numbers.

    Raises:
        ExploreError: It is none of these, or its arrays do not fit each other.
    """
    where = f"--features {shown(str(path))}"
    try:
        names, features, views = _READERS[path.suffix.lower()](path)
    except ExploreError:
        raise
    except KeyError as error:
        raise ExploreError(
            f"{where}: expected an .npz with the arrays names and features, an .npy with the names "
            f"in {shown(path.stem)}.txt, or a .parquet; {error} is missing"
        ) from error
    except ImportError as error:
        raise ExploreError(f"{where} needs pyarrow: pip install pyarrow") from error
    except OSError as error:
        raise ExploreError(f"{where}: {shown(str(error))}") from error
    except Exception as error:  # whatever a damaged file makes numpy or pyarrow raise
        raise ExploreError(f"{where} cannot be read, or is damaged: {error}") from error
    if features.ndim != 2 or len(features) != len(names):
        raise ExploreError(
            f"{where}: expected features (n, d), a row for each of {len(names)} names, got an "
            f"array of shape {features.shape}"
        )
    if views is not None and views.shape[1:] != features.shape:
        raise ExploreError(
            f"{where}: expected views (v, {len(names)}, {features.shape[1]}), got {views.shape}"
        )
    if not all(np.isfinite(values).all() for values in (features, views) if values is not None):
        raise ExploreError(f"{where}: expected finite numbers, got NaN or infinite ones")
    rows = {str(name).replace("/", os.sep): i for i, name in enumerate(names)}
    return rows, features, views


_Columns = tuple[Sequence[str], Array, Array | None]


def _of_npz(path: Path) -> _Columns:
    with path.open("rb") as stream, np.load(stream) as file:
        views = file["views"] if "views" in file.files else None
        return file["names"].tolist(), file["features"], views


def _of_npy(path: Path) -> _Columns:
    names = path.with_suffix(".txt")
    if not names.is_file():
        raise KeyError(names.name)
    return names.read_text(encoding="utf-8").splitlines(), np.load(path), None


def _of_parquet(path: Path) -> _Columns:
    import pyarrow.parquet
    import pyarrow.types as kinds

    table = pyarrow.parquet.read_table(path)
    columns = dict(zip(table.column_names, table.columns, strict=True))
    text = [c for c in columns.values() if kinds.is_string(c.type) or kinds.is_large_string(c.type)]
    lists = [
        c
        for c in columns.values()
        if kinds.is_list(c.type) or kinds.is_large_list(c.type) or kinds.is_fixed_size_list(c.type)
    ]
    numbers = [c.to_numpy() for c in columns.values() if kinds.is_floating(c.type)]
    if not text or not (lists or numbers):
        raise KeyError("a column of names or of features")
    features = np.array(lists[0].to_pylist()) if lists else np.stack(numbers, axis=1)
    return text[0].to_pylist(), features, None


_READERS = {".npz": _of_npz, ".npy": _of_npy, ".parquet": _of_parquet}
