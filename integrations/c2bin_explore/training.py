"""Train a network from scratch on the pixels of a folder, by C2BIN: without pretrained weights."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from c2bin_lightly.training import C2BIN
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from c2bin_explore.embedding import Embedder, normalized, view
from c2bin_explore.images import Array, ExploreError, set_aside, shown
from c2bin_explore.networks import IMAGENET
from c2bin_ext._hosts import epoch_checkpoint, seed_generators, whole_file

BACKBONES = ("small", "resnet18", "resnet50")
LARGEST_BATCH = 256
# lightly's recipe for small images: SGD, 0.06 per 128 images of a batch.
_LR_PER_IMAGE = 0.06 / 128
_SEEN, _STEPS = 100_000, 1_000
_HEADS = (8, 32, 128)


@dataclass(frozen=True)
class Settings:
    """What decides the result of a training, besides the images."""

    backbone: str
    image_size: int
    epochs: int
    batch_size: int
    seed: int


def default_batch_size(images: int) -> int:
    """Return the images of a batch: a quarter of a folder at most, so that an epoch is some steps.

    Examples:
        >>> default_batch_size(20_000), default_batch_size(400), default_batch_size(12)
        (256, 100, 6)
    """
    return max(2, min(LARGEST_BATCH, max(images // 4, min(images // 2, 32))))


def default_epochs(images: int, batch_size: int) -> int:
    """Return how often to see each image: 100,000 in all, in 1,000 steps at most; 10 at least.

    Examples:
        >>> [default_epochs(n, default_batch_size(n)) for n in (20_000, 5_000, 400, 12)]
        [10, 20, 250, 500]
    """
    return max(10, min(round(_SEEN / images), _STEPS // steps_of_epoch(images, batch_size)))


def settings_of(
    backbone: str, image_size: int, images: int, epochs: int | None, seed: int
) -> Settings:
    """Return the settings for n images, with the default number of epochs if none is given."""
    batch = default_batch_size(images)
    return Settings(backbone, image_size, epochs or default_epochs(images, batch), batch, seed)


def steps_of_epoch(images: int, batch_size: int) -> int:
    """Return how many batches an epoch has: each image is in one of them."""
    return max(1, round(images / batch_size))


def default_image_size(side: float, gpu: bool) -> int:
    """Return the training size in px for images whose shorter side is typically `side` px."""
    if side < 48:
        return 32
    if side < 80:
        return 48
    return 96 if gpu and side >= 128 else 64


class _Model(C2BIN):
    """C2BIN over batches of plain uint8 images: the two views are drawn on the device."""

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Any:
        """Return `((view0, view1),)` of images uint8 (n, 3, S, S)."""
        return (tuple(normalized(view(batch), *IMAGENET) for _ in range(2)),)


class _Pixels(Dataset[Tensor]):
    """Indexed by a whole batch's indices, so that no batch is collated from single images."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __getitem__(self, indices: Any) -> Tensor:
        return self.pixels[indices]


class _Batches(Sampler[Any]):
    """All images in batches of about equal size, in an order of the seed and the epoch only."""

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed, self.epoch = images, batch_size, seed, 0

    def __len__(self) -> int:
        return steps_of_epoch(self.images, self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        # A generator, so that the epoch is read at its first batch and not when the trainer
        # prepares the loader, which after a resumption is before the epoch is known.
        draw = torch.Generator().manual_seed(_stream(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=draw)
        yield from torch.tensor_split(order, len(self))


def _stream(seed: int, epoch: int) -> int:
    return (seed * 100_003 + epoch) % 2**32


class _Progress(Callback):
    """Fixes the seed and the order of every epoch and tells of progress."""

    def __init__(self, batches: _Batches, tell: Callable[[int, int], None]) -> None:
        self.batches, self.tell = batches, tell

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run draws what an uninterrupted one draws.
        self.batches.epoch = trainer.current_epoch
        stream = _stream(self.batches.seed, trainer.current_epoch)
        seed_generators(stream, stream, stream)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.tell(trainer.global_step, (trainer.max_epochs or 1) * len(self.batches))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss, epoch = float(trainer.callback_metrics["train_loss"]), trainer.current_epoch + 1
        if not math.isfinite(loss):
            raise ExploreError(f"training diverged in epoch {epoch}: the loss is {loss}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the trainer's advice to developers off the terminal of somebody who has a folder."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        logger.setLevel(level)


def trained(
    embedder: Embedder,
    squares: Array,
    settings: Settings,
    kept: Path,
    tell: Callable[[int, int], None],
) -> Array:
    """Train an embedder's network and return features (n, 1 + views, d), or what `kept` has of it.

    Args:
        embedder: With random weights.
        squares: uint8 (n, S, S, 3).
        settings: What to train, and how long.
        kept: File for the result.
        tell: Is told of progress.
    """
    module = embedder.network.features
    if kept.exists():
        try:
            content = torch.load(kept, map_location="cpu", weights_only=True)
            module.load_state_dict(content["state_dict"])
            features: Array = content["features"].numpy()
            return features
        except Exception:  # whatever a cut file makes torch raise
            print(f"{shown(str(set_aside(kept)))}: damaged, set aside; training begins again")
    state = kept.with_suffix(".part.ckpt")
    pixels = torch.from_numpy(np.ascontiguousarray(squares.transpose(0, 3, 1, 2)))
    train(module, pixels, settings, state, embedder.device, tell)
    features = embedder(squares)
    weights = {name: value.cpu() for name, value in module.state_dict().items()}
    with whole_file(kept) as part:
        torch.save({"state_dict": weights, "features": torch.from_numpy(features)}, part)
    state.unlink(missing_ok=True)
    return features


def train(
    backbone: nn.Module,
    pixels: Tensor,
    settings: Settings,
    checkpoint: Path,
    device: str,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train a backbone, from the last finished epoch if `checkpoint` is there.

    Args:
        backbone: From images (n, 3, S, S) to features (n, d); its weights are where a resumed
            training began, too.
        pixels: uint8 (n, 3, S, S).
        settings: What to train, and how long.
        checkpoint: File for the state after each epoch.
        device: Of torch.
        tell: Is told of progress.

    Raises:
        ExploreError: If the loss is no longer finite.
        KeyboardInterrupt: After Ctrl-C.
    """
    batches = _Batches(len(pixels), settings.batch_size, settings.seed)
    smallest = len(pixels) // len(batches)
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, *pixels.shape[2:])).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = _Model(
            backbone.train(),
            features,
            num_clusters=[k for k in _HEADS if k <= smallest] or [2],
            hidden_dim=1024,
            projection_dim=256,
            follower_schedule="cosine",
            lr=_LR_PER_IMAGE * settings.batch_size,
        )
    precision: Any = "32-true"
    if device == "cuda":
        precision = "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    if checkpoint.exists():
        try:
            torch.load(checkpoint, map_location="cpu", weights_only=True)["epoch"]
        except Exception:  # whatever a cut file makes torch raise
            aside = shown(str(set_aside(checkpoint)))
            print(f"{aside}: damaged, set aside; training begins again")
    with _quiet():
        trainer = Trainer(
            accelerator="gpu" if device == "cuda" else device,
            devices=1,
            precision=precision,
            max_epochs=settings.epochs,
            callbacks=[_Progress(batches, tell), epoch_checkpoint(checkpoint)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # With a generator of its own: an iterator of the loader would draw from the global one.
        loader = DataLoader(
            _Pixels(pixels), sampler=batches, batch_size=None, generator=torch.Generator()
        )
        try:
            trainer.fit(model, loader, ckpt_path=checkpoint if checkpoint.exists() else None)
        except SystemExit:
            # Lightning makes an exit of Ctrl-C; it has to reach the message that says how to go on.
            raise KeyboardInterrupt from None
    backbone.eval()
