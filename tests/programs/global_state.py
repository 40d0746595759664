"""Prints whether importing the package leaves the state of torch, random and logging alone."""

import logging
import random
from typing import Any

import torch


def state() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.initial_seed(),
        random.getstate(),
        logging.getLogger().handlers[:],
        torch.get_rng_state().tolist(),
        torch.cuda.is_initialized(),
    )


if __name__ == "__main__":
    before = state()
    import c2bin_ext  # noqa: F401

    print(before == state())
