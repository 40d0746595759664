"""What numbers and times were made with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from benchmarks.hardware import processor

import c2bin_ext


def versions(*more: str) -> dict[str, str]:
    """Return the versions that the numbers depend on; `more` are further distributions."""
    found = {"python": platform.python_version(), "c2bin_ext": c2bin_ext.__version__}
    found["torch"] = str(torch.__version__)  # with its build, such as +cu130
    names = {name: name for name in ("lightly", "numpy", "torchvision", *more)}
    names |= {"pytorch_lightning": "pytorch-lightning", "sklearn": "scikit-learn"}
    for name, distribution in names.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return what the times were taken on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": processor(torch.device("cpu")),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": ", ".join(gpus) or None,
    }
