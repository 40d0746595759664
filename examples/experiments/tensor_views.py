"""Views of whole batches, made on tensors where the images are: on a GPU, nothing else keeps up.

The distribution is that of `views.view_transform`, with two liberties: the order of the changes of
colour is drawn once a batch and not for every image, and values are not rounded to 256 steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from experiments.data import Images
from experiments.views import JITTER, Augmentation, EpochSampler, stream

Batch = tuple[Any, ...]

# Tries of a random crop before the whole image is taken, and bounds of its width by its height, as
# in torchvision's RandomResizedCrop.
TRIES, RATIO = 10, (3 / 4, 4 / 3)
GREY = (0.299, 0.587, 0.114)


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return n numbers between two bounds, on the generator's device."""
    draws = torch.rand(n, generator=generator, device=generator.device)
    return low + (high - low) * draws


def random_boxes(
    n: int, size: int, scale: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Return n random crops (left, top, width, height) of square images, in pixels, (n, 4)."""
    tries = n * TRIES
    area = uniform(tries, *scale, generator) * size**2
    low, high = torch.tensor(RATIO).log().tolist()
    ratio = uniform(tries, low, high, generator).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).round()
    sides = sides.view(n, TRIES, 2)
    fits = ((sides > 0) & (sides <= size)).all(dim=2)
    first = fits.int().argmax(dim=1)  # the first that fits
    chosen = sides[torch.arange(n, device=sides.device), first]
    chosen = torch.where(fits.any(dim=1, keepdim=True), chosen, float(size))
    spare = size - chosen + 1
    draws = torch.rand(n, 2, generator=generator, device=generator.device)
    corner = torch.minimum((draws * spare).floor(), spare - 1)
    return torch.cat([corner, chosen], dim=1)


def cropped(images: Tensor, boxes: Tensor) -> Tensor:
    """Return crops, scaled up to the size of the images by bilinear interpolation.

    Args:
        images: (n, 3, S, S).
        boxes: (left, top, width, height) of each, in pixels, (n, 4).
    """
    size = images.shape[-1]
    middles = (torch.arange(size, device=images.device) + 0.5) / size
    corner, sides = boxes[:, :2, None], boxes[:, 2:, None]
    # Pixels beyond the crop take no part.
    places = (corner + sides * middles - 0.5).maximum(corner).minimum(corner + sides - 1)
    places = 2 * places / (size - 1) - 1  # (n, 2, S)
    across = places[:, 0, None, :].expand(-1, size, -1)
    down = places[:, 1, :, None].expand(-1, -1, size)
    grid = torch.stack([across, down], dim=3)
    return grid_sample(images, grid.to(images.dtype), align_corners=True)


def turned(images: Tensor, degrees: Tensor) -> Tensor:
    """Return images turned counter-clockwise about their middles, black where nothing is."""
    size = images.shape[-1]
    middles = (2 * torch.arange(size, device=images.device) + 1) / size - 1
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    cosine, sine = degrees.deg2rad().cos()[:, None, None], degrees.deg2rad().sin()[:, None, None]
    grid = torch.stack([cosine * x - sine * y, sine * x + cosine * y], dim=3)
    return grid_sample(images, grid, mode="nearest", align_corners=False)


def greyed(images: Tensor) -> Tensor:
    """Return the luma of RGB images in [0, 1], (n, 1, S, S)."""
    weights = torch.tensor(GREY, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def blended(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """Return `factor · image + (1 − factor) · other`, within [0, 1]."""
    return torch.lerp(others, images, factors.view(-1, 1, 1, 1)).clamp(0, 1)


def hue_turned(images: Tensor, turns: Tensor) -> Tensor:
    """Return RGB images in [0, 1] whose hue is moved by a part of the circle, one an image."""
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    red, green, blue = images.unbind(1)
    scale = chroma.clamp(min=1e-8)
    hue = torch.where(
        value == red,
        (green - blue) / scale,
        torch.where(value == green, 2 + (blue - red) / scale, 4 + (red - green) / scale),
    )
    hue = hue + 6 * turns.view(-1, 1, 1)
    # A channel is the value less what its distance from the hue takes of the chroma.
    channels = []
    for middle in (5, 3, 1):
        far = (hue + middle) % 6
        channels.append(value - chroma * torch.minimum(far, 4 - far).clamp(0, 1))
    return torch.stack(channels, dim=1)


def jittered(images: Tensor, factors: dict[str, Tensor], order: list[str]) -> Tensor:
    """Return RGB images in [0, 1] with other brightness, contrast, saturation and hue.

    Args:
        images: (n, 3, S, S).
        factors: By name, one an image; of the hue, turns.
        order: The names, first to last.
    """
    for name in order:
        factor = factors[name]
        if name == "brightness":
            images = (images * factor.view(-1, 1, 1, 1)).clamp(0, 1)
        elif name == "contrast":
            images = blended(images, greyed(images).mean(dim=(2, 3), keepdim=True), factor)
        elif name == "saturation":
            images = blended(images, greyed(images), factor)
        else:
            images = hue_turned(images, factor)
    return images


def random_views(
    images: Tensor,
    kind: Augmentation,
    generator: torch.Generator,
    scale: tuple[float, float] | None = None,
) -> Tensor:
    """Return a random view of each image, float32 in [−1, 1].

    Args:
        images: uint8 (n, 3, S, S).
        kind: What makes a view.
        generator: Of all draws, on the device of the images.
        scale: Least and largest area of a crop in place of the kind's.
    """
    n, size = len(images), images.shape[-1]

    def chance(probability: float) -> Tensor:
        draws = torch.rand(n, generator=generator, device=generator.device)
        return (draws < probability).view(-1, 1, 1, 1)

    views = images.float() / 255
    boxes = random_boxes(n, size, scale or (kind.smallest, 1.0), generator)
    views = cropped(views, boxes)
    if kind.flipped:
        views = torch.where(chance(kind.flipped), views.flip(3), views)
    if kind.degrees:
        views = turned(views, uniform(n, -kind.degrees, kind.degrees, generator))
    if kind.jittered:
        factors = {
            name: uniform(n, -width, width, generator) + (name != "hue")
            for name, width in JITTER.items()
        }
        names = [*JITTER]
        # The order comes from the seed and not from a draw, which would have to leave the GPU.
        shuffle = torch.Generator().manual_seed(generator.initial_seed())
        order = [names[i] for i in torch.randperm(len(names), generator=shuffle).tolist()]
        views = torch.where(chance(kind.jittered), jittered(views, factors, order), views)
    if kind.grey:
        views = torch.where(chance(kind.grey), greyed(views), views)
    return 2 * views - 1


class TensorViews:
    """A loader of batches of views, `((view0, view1), labels, small0, small1, …)`, on a device.

    Args:
        images: Trained on; all of them are kept on the device.
        dataset: Decides what makes a view.
        sampler: The order; it is this rank's share.
        batch_size: Of this rank.
        seed: With the sampler's epoch and rank and the number of the batch, fixes the views.
        device: Where views are made.
        crops: Further views of at most a third of each image.
    """

    def __init__(
        self,
        images: Images,
        dataset: str,
        sampler: EpochSampler,
        batch_size: int,
        seed: int,
        device: torch.device,
        crops: int = 0,
    ) -> None:
        self.images, self.labels = images.train.to(device), images.train_labels.to(device)
        self.kind, self.sampler, self.batch_size = Augmentation.of(dataset), sampler, batch_size
        self.seed, self.crops = seed, crops

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        keys = list(self.sampler)
        device = self.images.device
        for i in range(len(self)):
            own = keys[i * self.batch_size : (i + 1) * self.batch_size]
            epoch, rows = own[0][0], torch.tensor([row for _, row in own], device=device)
            generator = torch.Generator(device)
            place = i * self.sampler.world_size + self.sampler.rank
            generator.manual_seed(stream(self.seed, epoch) * 10_000_019 + place)
            images = self.images[rows]
            views = random_views(images.repeat(2, 1, 1, 1), self.kind, generator).chunk(2)
            small: tuple[Tensor, ...] = ()
            if self.crops:
                many = images.repeat(self.crops, 1, 1, 1)
                small = random_views(many, self.kind, generator, (0.08, 1 / 3)).chunk(self.crops)
            yield views, self.labels[rows], *small
