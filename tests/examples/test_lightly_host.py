"""examples/lightly_benchmark.py without a checkout: a method through lightly's BenchmarkModule."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from c2bin_lightly import C2BINBenchmark
from PIL import Image


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The options of the smallest run: ten images of five classes, two epochs."""
    draw = np.random.default_rng(0)
    for name in ("train", "val"):
        for image in range(10):
            folder = tmp_path / name / str(image % 5)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.png")
    options = {"train-dir": tmp_path / "train", "val-dir": tmp_path / "val", "image-size": 16}
    options |= {"num-classes": 5, "batch-size-per-device": 4, "num-workers": 0}
    return ["--smoke", *(f"--{name}={value}" for name, value in options.items())]


@pytest.mark.filterwarnings("ignore")
def test_interrupted_and_resumed_it_scores_as_if_it_had_not_been(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments import lightly_host

    epochs: list[int] = []
    step, fails = C2BINBenchmark.training_step, False

    def watched(self: Any, batch: Any, batch_idx: int) -> Any:
        epochs.append(self.current_epoch)
        if fails and self.current_epoch == 1:
            raise RuntimeError("the power fails")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(C2BINBenchmark, "training_step", watched)
    args = lightly_host.parse([*command, "--accelerator=cpu"])
    with mock.patch.dict(os.environ):  # the seed of a run is there
        whole = lightly_host.through_the_module(args, "c2bin", tmp_path / "whole")
        fails = True
        with pytest.raises(RuntimeError, match="the power fails"):
            lightly_host.through_the_module(args, "c2bin", tmp_path / "cut")
        fails = False
        epochs.clear()
        resumed = lightly_host.through_the_module(args, "c2bin", tmp_path / "cut")
    assert epochs == [1, 1]
    assert {"knn top1", "max knn top1", "linear top1", "val_nmi_0_of_4"} <= set(whole)
    assert resumed == whole
