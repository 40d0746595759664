"""The benchmark of the losses does every size in one call."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightly")

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def test_the_grid_compiles_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import loss_cost

    monkeypatch.setattr(loss_cost, "GRID_N", (8, 16))
    monkeypatch.setattr(loss_cost, "GRID_K", ((3,), (2, 4)))
    # Dynamo alone: it is what counts, and what gives up above its limit.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    command = ["loss_cost.py", "--grid", "--rounds", "3", "--seconds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    threads = torch.get_num_threads()
    try:
        with torch._dynamo.config.patch(cache_size_limit=1):
            loss_cost.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "loss_cost_grid_cpu.json").read_text())["results"]
    sizes = {(row["n"], tuple(row["K"])) for row in found if row["what"].endswith(", compiled")}
    assert sizes == {(8, (3,)), (8, (2, 4)), (16, (3,)), (16, (2, 4))}
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in found)
