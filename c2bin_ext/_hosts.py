"""What adapters and applications share: checks of batches, epochs drawn alike, whole files."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a place beside `path` to write to; what is written there then becomes `path` in one go.

    After an error, or a kill, `path` is as it was; of two processes, the last one's is there.
    """
    part = Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def epoch_checkpoint(path: Path) -> Any:
    """Return a callback that keeps all that a resumed run needs in `path`, after each epoch."""
    from pytorch_lightning.callbacks import Checkpoint

    class EpochCheckpoint(Checkpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            # All processes have a part in it; the first one writes.
            with whole_file(path) if trainer.is_global_zero else nullcontext(path) as part:
                trainer.save_checkpoint(part)

    return EpochCheckpoint()


def seed_generators(for_torch: int, for_numpy: int, for_python: int) -> None:
    """Seed the three generators that augmentations draw from."""
    import numpy as np

    torch.manual_seed(for_torch)
    np.random.seed(for_numpy)
    random.seed(for_python)


def seed_epoch(trainer: Any, seed: int) -> None:
    """Draw an epoch from (seed, epoch, rank): its order, its augmentations and all else.

    Called from a LightningModule's `on_train_epoch_start`. A run that resumes from the checkpoint
    of a whole epoch then continues as the uninterrupted run would have, given as many loader
    workers and processes.

    Args:
        trainer: The Trainer, of `lightning` or of `pytorch_lightning`.
        seed: Of the run.
    """
    import numpy as np

    loop = trainer.fit_loop
    words = [seed, trainer.current_epoch, trainer.global_rank]
    generators = np.random.SeedSequence(words).generate_state(3)
    loaders = loop._combined_loader
    if any(hasattr(loader, "__next__") for loader in loaders.flattened):
        # An iterator cannot start again: what was fetched of it would be lost.
        seed_generators(*map(int, generators))
        return
    # Persistent workers would carry on the streams of the epochs before, which a resumed run does
    # not have.
    loaders.reset()
    seed_generators(*map(int, generators))
    # Lightning iterates the loader right after this hook, except in the first epoch of a fit: there
    # it did so before, with the generators and the sampler's epoch of that moment. Of a loader
    # without length its fetcher holds the first batch already, and has to let go of it.
    resuming = loop.epoch_loop.restarting or getattr(loop, "is_resuming", False)
    if trainer.current_epoch == 0 or resuming:
        iter(loop._data_fetcher)


def steps_of(trainer: Any, needed_by: str) -> int:
    """Return how many optimiser steps a Lightning run has at most, or name what needs to know."""
    steps = trainer.estimated_stepping_batches
    # Lightning's words for not knowing: infinity, or -1 with a loader that has no length.
    if not 0 <= steps < math.inf:
        raise ValueError(
            f"{needed_by}: expected a run whose number of steps is known, got max_epochs="
            f"{trainer.max_epochs}, max_steps={trainer.max_steps} and "
            f"{trainer.num_training_batches} batches an epoch; give the Trainer max_steps"
        )
    return int(steps)


def steps_of_epoch(trainer: Any, needed_by: str) -> int:
    """Return the optimiser steps of an epoch, or name what needs to know."""
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if batches == math.inf:
        raise ValueError(
            f"{needed_by}: expected a training loader with a length, which tells the steps of an "
            f"epoch, got one without; an integer limit_train_batches stands in for it"
        )
    steps: int = math.ceil(batches / trainer.accumulate_grad_batches)
    return steps


def described(value: Any, depth: int = 2) -> str:
    """Return what a batch is made of, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)) and depth:
        parts = [described(part, depth - 1) for part in value[:4]]
        return f"[{', '.join(parts + ['…'] * (len(value) > 4))}]"
    return type(value).__name__


def two_views(batch: Any, labelled: bool = False) -> tuple[Tensor, Tensor]:
    """Return the views of a training batch `((view0, view1), ...)`, with labels or without."""
    views = batch[0] if isinstance(batch, (list, tuple)) and len(batch) > labelled else None
    if (
        not isinstance(views, (list, tuple))
        or len(views) != 2
        or not all(isinstance(view, Tensor) for view in views)
    ):
        raise ValueError(
            "training batch: expected ((view0, view1), labels, ...), first a pair of views, each "
            f"(n, channels, height, width){'' if labelled else ', labels or not'}; got "
            f"{described(batch)}"
        )
    return views[0], views[1]


def labelled(batch: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels of a validation batch `(images, labels, ...)`."""
    if not (isinstance(batch, (list, tuple)) and len(batch) >= 2 and isinstance(batch[0], Tensor)):
        raise ValueError(
            "validation batch: expected (images, labels, ...), images (n, channels, height, "
            f"width) and labels (n,), below zero if unlabelled; got {described(batch)}"
        )
    return batch[0], batch[1]


def check_scorable(name: str, values: Tensor, labels: Tensor) -> None:
    """Check that what an accuracy is computed of has finite values and a class for each image."""
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        raise ValueError(
            f"{name}: expected a class, 0 or more, for every image, as an accuracy needs, got "
            f"{unlabelled} of {len(labels)} below 0; leave unlabelled images out"
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: expected finite values to score, got NaN or infinite ones")
