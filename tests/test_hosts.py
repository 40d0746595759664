"""Whole files: what adapters and examples write is there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from c2bin_ext._hosts import epoch_checkpoint, whole_file


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "numbers.csv"
    path.write_text("old")

    def half(part: Path) -> None:
        part.write_text("ne")
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"), whole_file(path) as part:
        half(part)
    assert path.read_text() == "old"
    with whole_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_write_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with whole_file(tmp_path / "table") as ours:
        monkeypatch.setattr("os.getpid", lambda: -1)
        with whole_file(tmp_path / "table") as theirs:
            assert ours != theirs
            theirs.write_text("theirs")
        ours.write_text("ours")
    assert (tmp_path / "table").read_text() == "ours"


@pytest.mark.parametrize("first", [True, False])
def test_all_processes_take_part_in_a_checkpoint_and_the_first_one_writes(
    first: bool, tmp_path: Path
) -> None:
    pytest.importorskip("pytorch_lightning")
    asked: list[Path] = []

    def save(path: Path) -> None:
        asked.append(path)
        if first:
            path.write_text("state")

    trainer: Any = SimpleNamespace(is_global_zero=first, save_checkpoint=save)
    epoch_checkpoint(tmp_path / "last.ckpt").on_train_epoch_end(trainer, None)
    assert len(asked) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"] * first
