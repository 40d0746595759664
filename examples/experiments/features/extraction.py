"""Features of images and of their augmented views, kept in a folder, block by block.

An interrupted extraction goes on where it stopped, and one of more images reuses what is there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from c2bin_explore import networks
from c2bin_explore.embedding import normalized
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from c2bin_ext._hosts import whole_file
from experiments.features.images import Pictures

Array = npt.NDArray[Any]
BLOCK = 1000  # images a file
BATCH, GPU_BATCH = 50, 250  # images a forward pass


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


@dataclass(frozen=True)
class _Block:
    """Images from `start` to `stop` in one view, whose features a file holds; 0: not augmented."""

    view: int
    start: int
    stop: int
    seed: int
    path: Path


@dataclass(frozen=True)
class _Pixels(Dataset[Array]):
    """Pixels (n, 3, size, size) of blocks, the same in whichever process they are made."""

    pictures: Pictures
    size: int
    blocks: list[_Block]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: int) -> Array:
        block, images = self.blocks[place], []
        augment = augmentation(self.size) if block.view else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(block.seed)
            for i in range(block.start, block.stop):
                image = self.pictures.read(i)
                pixels = np.asarray(image if augment else plain(image, self.size))
                tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
                images.append(augment(tensor) if augment else tensor)
        made: Array = torch.stack(images).numpy()
        return made


class Extractor:
    """Features of one network at one image size, cached in a folder.

    Args:
        network: its name, see `networks.load`.
        size: side of the images in pixels.
        cache: folder of the cached features.
        device: what to compute on.
        workers: processes that make views; 0: this one.
    """

    def __init__(
        self, network: str, size: int, cache: Path, device: str = "cpu", workers: int = 0
    ) -> None:
        self.name, self.size, self.cache = network, size, cache
        self.device, self.workers = device, workers
        self._loaded: networks.Network | None = None

    def features(self, pictures: Pictures, views: int = 0) -> tuple[Array, Array | None]:
        """Return features (n, d) and those of augmented views (v, n, d) or None, as float16.

        Args:
            pictures: the images.
            views: how many augmented views v of each.
        """
        starts = range(0, len(pictures), BLOCK)
        plan = [
            [self._block(pictures, view, start) for start in starts] for view in range(views + 1)
        ]
        missing = [block for blocks in plan for block in blocks if not block.path.exists()]
        loader = DataLoader(
            _Pixels(pictures, self.size, missing),
            batch_size=None,
            # Arrays go through pipes, tensors through shared memory, which may be small.
            collate_fn=np.asarray,
            num_workers=min(self.workers, len(missing)),
            generator=torch.Generator(),  # in place of the global one
        )
        self.cache.mkdir(parents=True, exist_ok=True)
        with tqdm(missing, desc=f"{self.name} at {self.size} px", unit="block") as bar:
            for block, pixels in zip(bar, loader, strict=True):
                with whole_file(block.path) as part, part.open("wb") as file:
                    np.save(file, self._features(pixels))
        stacked = [np.concatenate([np.load(block.path) for block in blocks]) for blocks in plan]
        return stacked[0], np.stack(stacked[1:]) if views else None

    def _block(self, pictures: Pictures, view: int, start: int) -> _Block:
        stop = min(start + BLOCK, len(pictures))
        about = [self.name, self.size, pictures.fingerprint(start, stop), view, "float16"]
        key = _key(about)
        # Views are the same on every device, features only almost.
        file = key if self.device == "cpu" else _key([*about, self.device])
        return _Block(view, start, stop, int(key[:12], 16), self.cache / f"{file}.npy")

    @torch.inference_mode()
    def _features(self, pixels: Array) -> Array:
        if self._loaded is None:
            self._loaded = networks.load(self.name, self.size)
            self._loaded.features.to(self.device).to(memory_format=torch.channels_last)
        network, parts = self._loaded, []
        for batch in torch.from_numpy(pixels).split(BATCH if self.device == "cpu" else GPU_BATCH):
            images = batch.to(self.device).float() / 255
            images = normalized(images, network.mean, network.std)
            images = images.to(memory_format=torch.channels_last)
            parts.append(network.features(images).float().cpu())
        found: Array = torch.cat(parts).half().numpy()
        return found


def _key(about: list[Any]) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
