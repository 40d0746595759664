"""Randomness that depends on seed, epoch and rank alone, so that a resumed run is the same run."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule

__all__ = ["SeededEpochs"]


class SeededEpochs(LightningModule):
    """Draws order, augmentations and all else of an epoch from (seed, epoch, rank).

    Only after `seed_everything`, which `Trainer` users and lightly's scripts call to ask for a
    reproducible run; without it nothing is touched. Then a run that resumes from the checkpoint of
    a whole epoch continues as the uninterrupted run would have, given the same number of loader
    workers and of processes.
    """

    def on_train_epoch_start(self) -> None:
        """Seed the generators of this process, and make the workers draw their seeds anew."""
        super().on_train_epoch_start()
        seed = os.environ.get("PL_GLOBAL_SEED")
        if seed is None:
            return
        loop: Any = self.trainer.fit_loop
        # Persistent workers would carry on the streams of the epochs before, which a resumed run
        # does not have.
        loop._combined_loader.reset()
        entropy = [int(seed), self.current_epoch, self.global_rank]
        for_torch, for_numpy, for_python = np.random.SeedSequence(entropy).generate_state(3)
        torch.manual_seed(int(for_torch))
        np.random.seed(for_numpy)
        random.seed(int(for_python))
        # Lightning iterates the loader right after this hook, except in the first epoch of a fit:
        # there it did so before, with the generators and the sampler's epoch of that moment.
        if (
            self.current_epoch == 0
            or getattr(loop, "is_resuming", False)
            or loop.epoch_loop.restarting
        ):
            iter(loop._combined_loader)
