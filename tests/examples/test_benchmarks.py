"""The benchmark of the losses does every size in one call; the explorer's has its images."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numpy as np
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
    counted = [row for row in found if not row["what"].endswith("compiled")]
    assert all(row["operators"] is None for row in found if row not in counted)
    # Two softmaxes, a product, a sum and its addition, and less than twice as many to go back.
    floors = {tuple(r["K"]): r["operators"] for r in counted if r["what"].startswith("floor")}
    assert 10 <= floors[3,] < 15
    assert 18 <= floors[2, 4] < 25
    assert all(row["operators"] >= 10 for row in counted)


def test_operators_are_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import loss_cost

    x = torch.randn(3, 4)
    with loss_cost.Operators() as counter:
        x.T[1:, 0].view(3, 1).expand(3, 2).detach()
        torch.empty_like(x)
        x.new_empty(3)
    assert counter.count == 0
    with loss_cost.Operators() as counter:
        (x @ x.T).sum().exp_()
        torch.sum(x, dim=0, out=x.new_empty(4))
        x.new_zeros(3)
    assert counter.count == 5


@pytest.mark.parametrize("kind", ["photographs", "many"])
def test_the_explorer_gets_its_images_and_an_empty_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import explore_quality

    def explore(folder: Path, out: Path, *options: str) -> dict[str, float]:
        assert len(list(folder.rglob("*.jpg"))) == 3
        assert not out.exists()
        assert folder not in (out, *out.parents)
        for name in ("names", "features") if options else ():
            assert len(np.load(options[1])[name]) == 3
        return {"seconds": 1.0}

    monkeypatch.setattr(explore_quality, "explore", explore)
    monkeypatch.setattr(sys, "argv", ["x", f"--{kind}", "3", "--out", str(tmp_path)])
    explore_quality.main()
    stored = json.loads((tmp_path / f"explore_{kind}.json").read_text())
    assert stored["settings"]["images"] == 3
    assert [*stored["results"].values()] == [{"seconds": 1.0}]
