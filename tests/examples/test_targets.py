"""Other targets for C2BIN's clusters, and the curves of long runs."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import decisions, learning_curves
from experiments.methods import VariedC2BIN
from experiments.study import TUNED
from experiments.targets import NearestFeatures, Sharpened, TemperedHead
from experiments.training import Progress
from PIL import Image
from torch import nn

from c2bin_ext import C2BINLoss, MultiScaleClusterHead

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SMALL = ["--limit", "60", "--limit-test", "40", "--batch-size", "20", "--tensor-views"]


def varied(**options: Any) -> VariedC2BIN:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    return VariedC2BIN(net, 8, num_clusters=(4, 6), hidden_dim=8, projection_dim=8, **options)


def test_heads_of_another_temperature() -> None:
    head = MultiScaleClusterHead(8, (3, 5), normalize=True)
    warm = TemperedHead(head, 0.25)
    warm.load_state_dict(head.state_dict())
    features = torch.randn(6, 8)
    for found, logits in zip(warm(features), head.logits(features), strict=True):
        torch.testing.assert_close(found, (logits * 4).softmax(dim=1))


def test_targets_are_sharper_and_nothing_else() -> None:
    p0, p1, z0, z1 = torch.randn(4, 6, 8)
    logits = torch.randn(2, 6, 5)
    heads = [[view.softmax(dim=1)] for view in logits]
    found = Sharpened(C2BINLoss(), 0.5)((p0, p1), (z0, z1), heads, target_assignments=heads)
    sharp = [[(2 * view).softmax(dim=1)] for view in logits]
    wanted = C2BINLoss()((p0, p1), (z0, z1), heads, target_assignments=sharp)
    torch.testing.assert_close(found.loss, wanted.loss)
    same = C2BINLoss()((p0, p1), (z0, z1), heads, target_assignments=heads)
    assert abs(found.contrast - same.contrast) > 1e-3
    torch.testing.assert_close(found.entropy, same.entropy)


def test_nearest_of_the_last_rows() -> None:
    nearest, kept = NearestFeatures(10, 4), deque[torch.Tensor](maxlen=10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        rows = torch.randn(3, 4, generator=generator)
        nearest.keep(rows)
        kept.extend(rows)
        asked = torch.randn(5, 4, generator=generator)
        for found, row in zip(nearest(asked), asked, strict=True):
            cosines = [float(torch.cosine_similarity(row, other, dim=0)) for other in kept]
            assert torch.equal(found, kept[cosines.index(max(cosines))])


def test_options_that_contradict_each_other() -> None:
    for options in ({"sharpen": 0.5}, {"neighbours": 0.5}):
        with pytest.raises(ValueError, match="sharpen, neighbours: expected 1"):
            varied(against="runner", **options)
    with pytest.raises(ValueError, match="crops: expected an even number, got 3"):
        varied(crops=3)


def test_a_warm_up_reaches_the_loss_inside_a_queue() -> None:
    model = varied(against="runner", warmup=0.5, queue=8)
    model.done = lambda: 0.25
    model.on_train_batch_start([], 0)
    assert model.criterion.loss.loss.cluster_weight == 0.25


def test_small_crops_are_held_against_the_follower(monkeypatch: pytest.MonkeyPatch) -> None:
    model = varied(crops=2)
    monkeypatch.setattr(VariedC2BIN, "log_losses", lambda *_: None)
    view0, view1, small0, small1 = torch.randn(4, 6, 3, 2, 2)
    labels = torch.zeros(6)
    found = model.training_step(((view0, view1), labels, small0, small1), 0)
    whole = model.training_step(((view0, view1), labels), 0)
    # The follower sees the whole views only: put these in its place, the small ones in the other.
    followed = [model.method.follower_features(view) for view in (view0, view1)]
    features = [model(view) for view in (small0, small1)]
    with torch.no_grad():
        fixed = [model.cluster_head(f) for f in followed]
    small = model.criterion.loss(
        [model.method.predictor(model.method.projector(f)) for f in features],
        [model.method.follower_projector(f) for f in followed],
        [model.cluster_head(f) for f in features],
        target_assignments=fixed,
    ).loss
    torch.testing.assert_close(found, (whole + small) / 2)


def test_tuned_settings_are_those_that_won() -> None:
    rows = json.loads((RESULTS / "study.json").read_text())["final"]
    won = {row["method"]: row for row in rows if row["row"].endswith(", tuned")}
    for method, trial in TUNED.items():
        assert trial.options == won[method]["options"]
        assert trial.loss == won[method]["loss"] == {}


def test_curves_of_long_runs(tmp_path: Path) -> None:
    command = [*SMALL, "--epochs", "2", "--seeds", "0", "--out", str(tmp_path)]
    rows = ["BYOL, tuned", "C2BIN, near neighbours"]
    assert learning_curves.main([*command, "--rows", *rows]) == 0
    record = json.loads((tmp_path / "learning_curves.json").read_text())
    assert [row["row"] for row in record["rows"]] == rows
    byol, c2bin = (row["curve"] for row in record["rows"])
    assert [*byol] == [*c2bin] == ["1", "2"]
    assert "heads_nmi" not in byol["2"]
    heads = [c2bin["2"][f"nmi_of_{k}"] for k in (32, 64, 128)]
    assert c2bin["2"]["heads_nmi"] == pytest.approx(sum(heads) / 3)
    for row in record["rows"]:  # the last point is the table's, but for k-means' fewer starts
        (end,) = row["results"].values()
        assert row["curve"]["2"]["knn200"] == end["knn200"]
    with Image.open(tmp_path / "learning_curves.png") as picture:
        assert picture.width > 900


def test_curves_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*SMALL, "--epochs", "3", "--seeds", "0", "--out", str(tmp_path)]
    command += ["--rows", "BYOL, tuned", "SimCLR, tuned"]
    assert learning_curves.main([*command, "--so-far"]) == 2  # nothing is there
    end = Progress.on_train_epoch_end

    def stopped(self: Progress, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 2 and "BYOL" in self.label:
            raise KeyboardInterrupt
        end(self, trainer, module)

    monkeypatch.setattr(Progress, "on_train_epoch_end", stopped)
    assert learning_curves.main(command) == 130
    monkeypatch.undo()
    assert learning_curves.main([*command, "--so-far"]) == 0
    record = json.loads((tmp_path / "learning_curves.json").read_text())
    curves = {row["row"]: [*row["curve"]] for row in record["rows"]}
    assert curves == {"SimCLR, tuned": ["1", "2", "3"], "BYOL, tuned": ["1", "2"]}
    said = (tmp_path / "learning_curves.md").read_text()
    assert "whole epochs so far: BYOL, tuned 2." in said
    assert len([line for line in said.splitlines() if line.startswith("| SimCLR, tuned")]) == 2
    assert len([line for line in said.splitlines() if line.startswith("| BYOL, tuned")]) == 1
    assert learning_curves.main(command) == 0  # and goes on
    assert "so far" not in (tmp_path / "learning_curves.md").read_text()


def test_every_way_beyond_the_paper_trains(tmp_path: Path) -> None:
    rows = ["both softmaxes at 0.5", "follower's softmax at 0.5", "two small crops"]
    command = ["beyond", *SMALL, "--epochs", "1", "--seeds", "0", "--out", str(tmp_path)]
    assert decisions.main([*command, "--only", *rows, "--baselines", "byol"]) == 0
    record = json.loads((tmp_path / "beyond.json").read_text())
    assert {row["row"] for row in record["choices"]} == {"BYOL, no cluster terms", *rows}
    curves = [json.loads(path.read_text())["curve"] for path in tmp_path.glob("runs/*/result.json")]
    assert len({curve[0]["train_loss"] for curve in curves}) == 4
