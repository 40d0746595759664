"""Whole files, there whole or not at all, and what a message says of a batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from c2bin_ext._hosts import described, epoch_checkpoint, whole_file


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


def test_a_batch_is_described_two_levels_deep() -> None:
    image = torch.zeros(4, 3, 8, 8)
    batch = [(image, [image]), torch.zeros(4), {"name": 1}, None, 5]
    tensor = "a tensor of shape (4, 3, 8, 8)"
    expected = f"[[{tensor}, list], a tensor of shape (4,), dict, NoneType, …]"
    assert described(batch) == expected
