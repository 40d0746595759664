"""Views: what every method sees of the images, fixed by seed, epoch and index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightly.transforms.simclr_transform import SimCLRViewTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from c2bin_ext._hosts import seed_generators, whole_file
from experiments.data import Images


def stream(seed: int, epoch: int) -> int:
    """Return what the order and all other draws of an epoch are seeded from."""
    return seed * 100_003 + epoch


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed all generators, so that a resumed run draws what an uninterrupted one draws."""
    start = stream(seed, epoch) % 2**32
    seed_generators(start, start, start)


class Augmentation(NamedTuple):
    """What makes a view: lightly's SimCLR view with what makes sense for the images.

    The defaults are for photographs: lightly's CIFAR-10 settings (colour jitter 0.5, no blur).
    """

    smallest: float = 0.08  # crop, as a share of the image's area
    flipped: float = 0.5  # probability, as the next two
    jittered: float = 0.8
    grey: float = 0.2
    degrees: float = 0.0  # turned by up to so many

    @classmethod
    def of(cls, dataset: str) -> Augmentation:
        """Return that of a data set, the same for every method.

        Digits: nothing about colour, no flips, which turn a digit into none; a milder crop and a
        turn of up to 15 degrees.
        """
        if dataset == "digits":
            return cls(smallest=0.4, flipped=0.0, jittered=0.0, grey=0.0, degrees=15.0)
        return cls(jittered=0.0, grey=0.0) if dataset == "fashion-mnist" else cls()


# Of brightness, contrast and saturation: factors within 1 ± 0.4; of the hue: turns within ± 0.1.
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}


def view_transform(images: Images, dataset: str) -> SimCLRViewTransform:
    """Return lightly's transform for the views of these images."""
    kind = Augmentation.of(dataset)
    normalize = {"mean": [0.5] * 3, "std": [0.5] * 3}
    return SimCLRViewTransform(
        input_size=images.size,
        cj_prob=kind.jittered,
        cj_strength=0.5,
        min_scale=kind.smallest,
        random_gray_scale=kind.grey,
        gaussian_blur=0.0,
        hf_prob=kind.flipped,
        rr_prob=float(kind.degrees > 0),
        rr_degrees=kind.degrees or None,
        normalize=normalize,
    )


def normalized(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [−1, 1], like the views."""
    return images.float().div(127.5).sub(1.0)


class Views(Dataset[tuple[tuple[Tensor, Tensor], int]]):
    """Two views of each image; the key (epoch, index) fixes them, whatever process makes them."""

    def __init__(self, images: Images, dataset: str, seed: int) -> None:
        self.images, self.labels, self.seed = images.train, images.train_labels, seed
        self.transform = view_transform(images, dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], int]:
        epoch, index = key
        start = (stream(self.seed, epoch) * 10_000_019 + index) % 2**32
        # lightly's transforms draw from both global generators. default_generator, because
        # torch.manual_seed visits every accelerator and would cost as much as a view.
        torch.default_generator.manual_seed(start)
        np.random.seed(start)
        image = Image.fromarray(self.images[index].permute(1, 2, 0).numpy())
        return (self.transform(image), self.transform(image)), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.images)


class StoredViews(Dataset[tuple[tuple[Tensor, Tensor], int]]):
    """Views of every epoch, made once and read by all methods of a seed; the same as `Views`."""

    def __init__(self, path: Path, views: Views, epochs: int) -> None:
        self.labels = views.labels
        if not path.exists():
            shape = (epochs, len(views), 2, *views.images.shape[1:])
            with (
                whole_file(path) as part,
                tqdm(total=epochs * len(views), desc="views", leave=False, disable=None) as bar,
            ):
                stored = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
                for epoch in range(epochs):
                    for index in range(len(views)):
                        pair = torch.stack(views[epoch, index][0])
                        stored[epoch, index] = pair.add(1).mul(127.5).round().byte().numpy()
                        bar.update()
                stored.flush()
        self.stored = np.load(path, mmap_mode="r")

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], int]:
        pair = normalized(torch.from_numpy(self.stored[key].copy()))
        return (pair[0], pair[1]), int(self.labels[key[1]])

    def __len__(self) -> int:
        return len(self.labels)


class EpochSampler(Sampler[tuple[int, int]]):
    """This rank's share of every global batch, in an order that only seed and epoch decide.

    A global batch is the same images for any number of ranks, and a resumed run goes on with the
    order it would have had. Lightning calls `set_epoch` before each epoch; but it makes the first
    iterator before it restores a checkpoint, and keeps it, so `start` says which epoch that is for.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = start

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = max(epoch, self.start)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(stream(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        batches = order[: self.n // self.batch_size * self.batch_size].view(
            -1, self.world_size, self.batch_size // self.world_size
        )
        return iter([(self.epoch, index) for index in batches[:, self.rank].flatten().tolist()])

    def __len__(self) -> int:
        return self.n // self.batch_size * (self.batch_size // self.world_size)
