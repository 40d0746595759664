"""Train C2BIN on the pixels of a folder, and the features and assignments that come of it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from c2bin_lightly.training import C2BIN
from lightly.transforms.utils import IMAGENET_NORMALIZE
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from c2bin_explore.backbones import backbone
from c2bin_explore.images import ExploreError
from c2bin_ext._hosts import epoch_checkpoint, seed_generators
from c2bin_ext.checkpoints import load_backbone

BACKBONES = ("small", "resnet18", "resnet50")
LARGEST_BATCH = 256
_KEY = "c2bin_explore"
_EVALUATION_BATCH = 256
# lightly's recipe for small images: SGD, 0.06 per 128 images of a batch.
_LR_PER_IMAGE = 0.06 / 128


@dataclass(frozen=True)
class Settings:
    """What decides the result of a training, besides the images."""

    backbone: str
    image_size: int
    clusters: tuple[int, ...]
    epochs: int
    batch_size: int
    seed: int


def default_clusters(images: int) -> tuple[int, int, int]:
    """Return coarse, middle and fine numbers of clusters: at most 8, 32 and 128.

    The finest has about ten images a cluster, and none has more clusters than a batch has images.

    Examples:
        >>> default_clusters(20_000), default_clusters(400), default_clusters(5)
        ((8, 32, 128), (8, 18, 40), (2, 3, 4))
    """
    fine = max(2, min(128, LARGEST_BATCH, images, max(4, images // 10)))
    coarse = max(2, min(8, fine // 4))
    return coarse, round(math.sqrt(coarse * fine)), fine


def default_epochs(images: int) -> int:
    """Return how often to see each of n images: about 100,000 in total, 10 to 100 epochs."""
    return max(10, min(100, round(100_000 / images)))


def default_image_size(side: float, gpu: bool) -> int:
    """Return the training size in px for images whose shorter side is typically `side` px."""
    if side < 48:
        return 32
    if side < 80:
        return 48
    return 96 if gpu and side >= 128 else 64


class Model(C2BIN):
    """C2BIN over batches of plain uint8 images: the two views are drawn on the device."""

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Any:
        """Return `((view0, view1),)` of images uint8 (n, 3, S, S)."""
        return ((view(batch), view(batch)),)


def build(settings: Settings) -> Model:
    """Return an untrained model; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        size = settings.image_size
        # Unpooled, the first stage of a larger image would cost more than all of a 32 px network.
        net, features = backbone(settings.backbone, size, pooled=size > 40)
        return Model(
            net,
            features,
            num_clusters=settings.clusters,
            hidden_dim=1024,
            projection_dim=256,
            follower_schedule="cosine",
            lr=_LR_PER_IMAGE * settings.batch_size,
        )


def normalized(images: Tensor) -> Tensor:
    """Return float32 images for the backbone from uint8 images (n, 3, S, S)."""
    mean, std = (
        torch.tensor(IMAGENET_NORMALIZE[key], device=images.device).view(3, 1, 1)
        for key in ("mean", "std")
    )
    return (images.float() / 255 - mean) / std


def view(images: Tensor) -> Tensor:
    """Return one random view of each image: crop, flip, colour, grey; SimCLR's, a batch at a time.

    Args:
        images: uint8 (n, 3, S, S).

    Returns:
        Normalised float32 (n, 3, S, S).
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
    return normalized(x.clamp(0, 1) * 255)


class _Pixels(Dataset[Tensor]):
    """Indexed by a whole batch's indices, so that no batch is collated from single images."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __getitem__(self, indices: Any) -> Tensor:
        return self.pixels[indices]


class _Batches(Sampler[Any]):
    """Batches of equal size in an order that depends on the seed and the epoch alone."""

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed, self.epoch = images, batch_size, seed, 0

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        # A generator, so that the epoch is read at its first batch and not when the trainer
        # prepares the loader, which after a resumption is before the epoch is known.
        draw = torch.Generator().manual_seed(_stream(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=draw)
        yield from torch.split(order[: len(self) * self.batch_size], self.batch_size)


def _stream(seed: int, epoch: int) -> int:
    return (seed * 100_003 + epoch) % 2**32


class _Progress(Callback):
    """Fixes the seed and the order of every epoch and moves the bar."""

    def __init__(self, batches: _Batches) -> None:
        self.batches = batches
        self.bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = int(trainer.num_training_batches)
        epochs = trainer.max_epochs or 1
        self.bar = tqdm(
            total=epochs * steps,
            initial=trainer.current_epoch * steps,
            desc="Training",
            unit="step",
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run draws what an uninterrupted one draws.
        self.batches.epoch = trainer.current_epoch
        stream = _stream(self.batches.seed, trainer.current_epoch)
        seed_generators(stream, stream, stream)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss, epoch = float(trainer.callback_metrics["train_loss"]), trainer.current_epoch + 1
        if not math.isfinite(loss):
            raise ExploreError(f"training diverged in epoch {epoch}: the loss is {loss}")
        if self.bar is not None:
            self.bar.set_postfix(epoch=f"{epoch}/{trainer.max_epochs}", loss=f"{loss:.3f}")

    def teardown(self, *_: Any, **__: Any) -> None:
        if self.bar is not None:
            self.bar.close()


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


def accelerator(device: str) -> str:
    """Return Lightning's name of the device: `"cpu"`, `"gpu"` or `"mps"`.

    Raises:
        ExploreError: If there is no such device.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next((name for name, there in found.items() if there), "cpu")
    if not found.get(device, True):
        raise ExploreError(f"--device {device}: torch finds no such device here; try --device auto")
    return "gpu" if device == "cuda" else device


def train(pixels: Tensor, settings: Settings, checkpoint: Path, kind: str) -> Model:
    """Train, from the last finished epoch if `checkpoint` is there.

    Args:
        pixels: uint8 (n, 3, S, S).
        settings: What to train, and how long.
        checkpoint: File for the state after each epoch.
        kind: See `accelerator`.

    Returns:
        The trained model, on the device.

    Raises:
        ExploreError: If the loss is no longer finite.
        KeyboardInterrupt: After Ctrl-C.
    """
    model = build(settings)
    precision: Any = "32-true"
    if kind == "gpu":
        precision = "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    batches = _Batches(len(pixels), settings.batch_size, settings.seed)
    with _quiet():
        trainer = Trainer(
            accelerator=kind,
            devices=1,
            precision=precision,
            max_epochs=settings.epochs,
            callbacks=[_Progress(batches), epoch_checkpoint(checkpoint)],
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
    return model.to(trainer.strategy.root_device)


@torch.no_grad()
def embed(model: Model, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return features (n, d) and each head's assignments (n, K) of uint8 images, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    features, heads = list[Tensor](), list[tuple[Tensor, ...]]()
    for batch in tqdm(torch.split(pixels, _EVALUATION_BATCH), desc="Features", unit="batch"):
        rows = model(normalized(batch.to(device))).float()
        features.append(rows.cpu())
        heads.append(tuple(p.cpu() for p in model.cluster_head(rows)))
    return torch.cat(features), tuple(torch.cat(parts) for parts in zip(*heads, strict=True))


def save(model: Model, settings: Settings, path: Path) -> None:
    """Write what `load` needs: the runner's backbone, the cluster heads and the settings."""
    weights = {
        name: value.detach().cpu()
        for name, value in model.state_dict().items()
        if name.startswith(("backbone.", "criterion.head."))
    }
    torch.save({"state_dict": weights, _KEY: asdict(settings)}, path)


def load(path: Path) -> tuple[Model, Settings]:
    """Return the model and the settings of a file that `save` wrote.

    Raises:
        ExploreError: If there is no such file, or it is another program's.
    """
    if not path.is_file():
        raise ExploreError(f"--checkpoint: there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        stored = content[_KEY]
        settings = Settings(**{**stored, "clusters": tuple(stored["clusters"])})
        model = build(settings)
        load_backbone(content, model.backbone)
        load_backbone(content, model.cluster_head, prefix="criterion.head.")
    except Exception as error:  # whatever a foreign file makes torch raise
        raise ExploreError(
            f"--checkpoint {path} does not fit: expected the model.ckpt that this command wrote "
            f"beside a page ({type(error).__name__}: {error})"
        ) from error
    return model, settings
