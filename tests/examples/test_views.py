"""Views made in batches on tensors, held against torchvision's functions, image by image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from experiments import tensor_views
from experiments.data import Images
from experiments.tensor_views import TensorViews
from experiments.views import Augmentation, EpochSampler
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

SIZE = 12


@pytest.fixture
def images() -> Tensor:
    return torch.rand(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loader(n: int = 20, dataset: str = "folder", **more: Any) -> TensorViews:
    pixels = torch.randint(256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=drawn())
    images = Images(pixels, torch.arange(n), pixels, torch.arange(n), ["a", "b"], "random")
    sampler = EpochSampler(n, 8, seed=3, **more)
    return TensorViews(images, dataset, sampler, 8 // sampler.world_size, 3, torch.device("cpu"))


def test_crops_are_torchvisions(images: Tensor) -> None:
    boxes = tensor_views.random_boxes(len(images), SIZE, (0.08, 1.0), drawn())
    found = tensor_views.cropped(images, boxes)
    for image, crop, (left, top, width, height) in zip(images, found, boxes.int(), strict=True):
        expected = functional.resized_crop(
            image, int(top), int(left), int(height), int(width), [SIZE, SIZE], antialias=False
        )
        torch.testing.assert_close(crop, expected, atol=1e-5, rtol=0)


def test_boxes_are_distributed_as_torchvisions() -> None:
    n, size = 20_000, 32
    ours = tensor_views.random_boxes(n, size, (0.08, 1.0), drawn()).double()
    torch.manual_seed(0)
    image = torch.empty(3, size, size)
    theirs = torch.tensor(
        [
            [j, i, w, h]
            for i, j, h, w in (
                v2.RandomResizedCrop.make_params(crop, [image]).values()
                for crop in [v2.RandomResizedCrop(size, scale=(0.08, 1.0))] * 4000
            )
        ]
    ).double()
    assert bool((ours[:, :2] + ours[:, 2:] <= size).all())
    assert bool((ours >= 0).all())
    for column in range(4):
        # Five standard errors of the difference of two means, and of two standard deviations.
        spread = theirs[:, column].std()
        error = spread * (1 / 4000 + 1 / n) ** 0.5
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 5 * error
        assert abs(ours[:, column].std() - spread) < 5 * error
    area = (ours[:, 2] * ours[:, 3]) / size**2
    assert area.min() < 0.1
    assert area.max() > 0.95


def test_turns_are_torchvisions(images: Tensor) -> None:
    degrees = tensor_views.uniform(len(images), -15, 15, drawn())
    for image, turned, angle in zip(
        images, tensor_views.turned(images, degrees), degrees, strict=True
    ):
        expected = functional.rotate(image, float(angle))
        # Nearest pixels: a rounding error apart, they may be others.
        assert (turned == expected).float().mean() > 0.98


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("brightness", functional.adjust_brightness),
        ("contrast", functional.adjust_contrast),
        ("saturation", functional.adjust_saturation),
        ("hue", functional.adjust_hue),
    ],
)
def test_colours_are_torchvisions(images: Tensor, name: str, function: Any) -> None:
    low, high = (-0.5, 0.5) if name == "hue" else (0.3, 1.7)
    factors = tensor_views.uniform(len(images), low, high, drawn(2))
    found = tensor_views.jittered(images, {name: factors}, [name])
    expected = torch.stack(
        [function(image, float(factor)) for image, factor in zip(images, factors, strict=True)]
    )
    # Their weights of the luma have a digit more.
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_views_of_photographs(images: Tensor) -> None:
    pixels = (images[:1] * 255).byte().expand(2000, -1, -1, -1)
    kind = Augmentation.of("folder")
    views = tensor_views.random_views(pixels, kind, drawn())
    assert views.dtype is torch.float32
    assert -1 <= float(views.min()) < -0.5 < 0.5 < float(views.max()) <= 1
    grey = (views[:, 0] == views[:, 1]).flatten(1).all(dim=1).float().mean()
    assert grey == pytest.approx(kind.grey, abs=0.04)
    plain = kind._replace(jittered=0.0, grey=0.0, smallest=1.0)
    whole = tensor_views.random_views(pixels, plain, drawn(), scale=(1.0, 1.0))
    middle = 2 * pixels[0].float() / 255 - 1
    flipped = torch.isclose(whole, middle.flip(2), atol=1e-5).flatten(1).all(dim=1)
    same = torch.isclose(whole, middle, atol=1e-5).flatten(1).all(dim=1)
    square = same | flipped  # of an area of 1, only a square fits
    assert flipped[square].float().mean() == pytest.approx(0.5, abs=0.05)


def test_views_of_digits_keep_their_sides() -> None:
    grey = torch.randint(256, (500, 1, SIZE, SIZE), dtype=torch.uint8, generator=drawn())
    views = tensor_views.random_views(
        grey.expand(-1, 3, -1, -1), Augmentation.of("digits"), drawn()
    )
    assert torch.equal(views[:, 0], views[:, 2])
    assert float((views == -1).float().mean()) > 0.01  # black corners of the turns


def test_seed_epoch_and_batch_fix_the_views() -> None:
    first, again = [list(loader()) for _ in range(2)]
    assert len(first) == len(loader()) == 2
    for (views, labels), (same, same_labels) in zip(first, again, strict=True):
        assert torch.equal(views[0], same[0])
        assert torch.equal(labels, same_labels)
    assert not torch.equal(first[0][0][0], first[0][0][1])
    later = loader()
    later.sampler.set_epoch(1)
    assert not torch.equal(next(iter(later))[0][0], first[0][0][0])


def test_ranks_share_a_batch_and_draw_apart() -> None:
    whole = [labels for _, labels in loader()]
    parts = [[*loader(rank=rank, world_size=2)] for rank in (0, 1)]
    for i, labels in enumerate(whole):
        assert torch.equal(torch.cat([parts[0][i][1], parts[1][i][1]]), labels)
    pixels = loader()
    pixels.images[:] = pixels.images[0]  # one image throughout: what differs is drawn
    apart = [loader(rank=rank, world_size=2) for rank in (0, 1)]
    for each in apart:
        each.images[:] = pixels.images[0]
    assert not torch.equal(next(iter(apart[0]))[0][0], next(iter(apart[1]))[0][0])


def test_small_crops_come_with_the_views() -> None:
    views = loader()
    views.crops = 4
    (view0, view1), _, *small = next(iter(views))
    assert [tuple(v.shape) for v in (view0, view1, *small)] == [(8, 3, SIZE, SIZE)] * 6


@pytest.mark.filterwarnings("ignore")  # of a module that trains nothing
def test_every_epoch_of_a_trainer_has_views_of_its_own() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watch(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            seen.append((batch[1], batch[0][0]))

        def configure_optimizers(self) -> None:
            pass

    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Watch(), loader())
    by_hand = loader()
    for epoch in (0, 1):
        by_hand.sampler.set_epoch(epoch)
        for (views, labels, *_), (rows, view0) in zip(by_hand, seen[2 * epoch :], strict=False):
            assert torch.equal(labels, rows)
            assert torch.equal(views[0], view0)
    assert not torch.equal(seen[0][0], seen[2][0])
