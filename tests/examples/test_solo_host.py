"""solo_benchmark.py around scripts that only write what solo-learn's write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from experiments import solo_host

METRICS = ("nmi", "acc", "purity", "ari", "clusters_in_use", "effective_clusters", "agreement")
WRITES = {
    "pretrain": [
        "val_acc1",
        *(f"val_{m}_{i}_of_{k}" for i, k in ((0, 4), (1, 8)) for m in METRICS),
    ],
    "linear": ["val_acc1", "val_acc5"],
}


def script(arguments: Any, pretrained: Path, stage: tuple[str, int, str]) -> list[str]:
    if stage[2] == "knn":
        return [sys.executable, "-c", "print('Result: acc@1=40.0, acc@5=80.5')"]
    names = WRITES[stage[2]]
    rows = f"{','.join(names)}\\n{','.join(['0.25'] * len(names))}\\n"
    folder = "Path('lightning_logs/version_0')"
    lines = ["from pathlib import Path", f"{folder}.mkdir(parents=True, exist_ok=True)"]
    lines.append(f"({folder} / 'metrics.csv').write_text('{rows}')")
    return [sys.executable, "-c", "\n".join(lines)]


def test_stages_are_kept_and_tabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "main_pretrain.py").touch()
    monkeypatch.setattr(solo_host, "command", script)
    monkeypatch.setattr(solo_host.signal, "signal", lambda *_: None)
    monkeypatch.setattr(solo_host.time, "sleep", lambda _: None)
    out = tmp_path / "out"
    call = ["--solo-learn", str(tmp_path), "--smoke", "--methods", "byol", "c2bin"]
    call += ["--out", str(out)]
    assert solo_host.main(call) == 0
    record = json.loads((out / "results.json").read_text())
    assert [run["method"] for run in record["runs"]] == ["byol", "c2bin"]
    assert record["runs"][0]["knn_acc5"] == 80.5
    table = (out / "results.md").read_text()
    assert "| BYOL" in table
    assert "| 0, K = 4" in table
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    assert len(before) == 6
    # What is there is not run again; other settings replace no table.
    monkeypatch.setattr(solo_host, "command", lambda *_: [sys.executable, "-c", "raise OSError"])
    assert solo_host.main(call) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    capsys.readouterr()
    assert solo_host.main([*call, "--lr", "0.5"]) == 2
    assert "lr was 0.12, is 0.5" in capsys.readouterr().err
    assert solo_host.main([*call, "--lr", "0.5", "--overwrite"]) == 2
    assert "failed, see" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [(["--batch-size", "99", "--queue-size", "99"], "fewer images in"), ([], "5 classes or more")],
)
def test_arguments_are_checked_against_the_images(
    option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "main_pretrain.py").touch()
    solo_host.draw_images(tmp_path / "images")
    if not option:
        for path in (tmp_path / "images").glob("*/class4/*"):
            path.unlink()
    call = ["--solo-learn", str(tmp_path), "--data", str(tmp_path / "images")]
    with pytest.raises(SystemExit):
        solo_host.main([*call, "--out", str(tmp_path / "out"), *option])
    assert message in capsys.readouterr().err
