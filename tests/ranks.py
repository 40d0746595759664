"""What tests over several processes share."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist


def join(rank: int, world: int, folder: str) -> None:
    """Make this process one of `world` gloo ranks that meet in `folder`, on one thread."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
