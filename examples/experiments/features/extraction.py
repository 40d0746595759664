"""Features of images and of their augmented views, kept in a folder, block by block.

An interrupted extraction goes on where it stopped, and one of more images reuses what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from c2bin_explore import networks
from c2bin_explore.embedding import normalized
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from c2bin_ext._hosts import whole_file
from experiments.features.images import Pictures

Array = npt.NDArray[Any]
BLOCK = 1000  # images a file
BATCH = 50  # images a forward pass


def augmentation(size: int) -> Any:
    """Return the random view: crop of at least 30 % of the area, flip, colours, sometimes grey."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.3, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
        ]
    )


def plain(image: Image.Image, size: int) -> Image.Image:
    """Return the central square of an image, scaled to `size` x `size` pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


class Extractor:
    """Features of one network at one image size, cached in a folder.

    Args:
        network: its name, see `networks.load`.
        size: side of the images in pixels.
        cache: folder of the cached features.
        device: what to compute on.
    """

    def __init__(self, network: str, size: int, cache: Path, device: str = "cpu") -> None:
        self.name, self.size, self.cache, self.device = network, size, cache, device
        self._loaded: networks.Network | None = None

    def features(self, pictures: Pictures, views: int = 0) -> tuple[Array, Array | None]:
        """Return features (n, d) and those of augmented views (v, n, d) or None, as float16.

        Args:
            pictures: the images.
            views: how many augmented views v of each.
        """
        blocks = range(0, len(pictures), BLOCK)
        plan = [(view, start) for view in range(views + 1) for start in blocks]
        parts: dict[int, list[Array]] = {view: [] for view in range(views + 1)}
        with tqdm(plan, desc=f"{self.name} at {self.size} px", unit="block") as bar:
            for view, start in bar:
                parts[view].append(self._block(pictures, view, start))
        stacked = [np.concatenate(part) for part in parts.values()]
        return stacked[0], np.stack(stacked[1:]) if views else None

    def _block(self, pictures: Pictures, view: int, start: int) -> Array:
        stop = min(start + BLOCK, len(pictures))
        about = [self.name, self.size, pictures.fingerprint(start, stop), view, "float16"]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
        path = self.cache / f"{key}.npy"
        if path.exists():
            block: Array = np.load(path)
            return block
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(key[:12], 16))
            batches = list(self._batches(pictures, view, start, stop))
        block = torch.cat(batches).half().numpy()
        self.cache.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part, part.open("wb") as file:
            np.save(file, block)
        return block

    @torch.inference_mode()
    def _batches(self, pictures: Pictures, view: int, start: int, stop: int) -> Iterator[Tensor]:
        if self._loaded is None:
            self._loaded = networks.load(self.name, self.size)
            self._loaded.features.to(self.device).to(memory_format=torch.channels_last)
        network = self._loaded
        augment = augmentation(self.size) if view else None
        for first in range(start, stop, BATCH):
            images = []
            for i in range(first, min(first + BATCH, stop)):
                image = pictures.read(i)
                pixels = np.asarray(image if augment else plain(image, self.size))
                tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
                images.append(augment(tensor) if augment else tensor)
            batch = normalized(torch.stack(images).float() / 255, network.mean, network.std)
            batch = batch.to(self.device, memory_format=torch.channels_last)
            yield network.features(batch).float().cpu()
