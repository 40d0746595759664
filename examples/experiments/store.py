"""Where commands keep what they did: finished runs, and the tables made of them.

OUT/runs/NAME-DIGEST/ is one run: settings.json, result.json once it is finished, until then what it
needs to go on. The digest is that of the settings, so runs of different settings never mix, and
every command that needs a run finds it. OUT/TABLE.json and OUT/TABLE.md are a table. A file is
there whole or not at all, whenever the process is killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from c2bin_ext._hosts import whole_file

Result = dict[str, Any]


class ExperimentError(Exception):
    """Something that the user has to put right; its text is one line that says what."""


def write(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, whoever else writes it."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def changes(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """Return in words what differs between two settings, `budget.epochs was 2, is 3`."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{within}{name}.")
        elif old != new:
            found.append(f"{within}{name} was {old}, is {new}")
    return found


@dataclass(frozen=True)
class Store:
    """The runs and tables of one results folder."""

    out: Path

    def open(self) -> None:
        """Make the folder ours; refuse one that is somebody else's."""
        if self.out.exists() and not self.out.is_dir():
            raise ExperimentError(f"--out {self.out} is a file")
        try:
            used = self.out.exists() and any(self.out.iterdir())
            if used and not (self.out / "runs").is_dir():
                raise ExperimentError(
                    f"--out {self.out} is not empty and not of these experiments: choose another"
                )
            (self.out / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExperimentError(f"cannot write to --out {self.out}: {error.strerror}") from error

    def folder(self, name: str, settings: Mapping[str, Any]) -> Path:
        """Return where the run of these settings is kept."""
        text = json.dumps(settings, sort_keys=True)
        return self.out / "runs" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def result(self, name: str, settings: Mapping[str, Any]) -> Result | None:
        """Return the result of a run, or None if it is not finished."""
        path = self.folder(name, settings) / "result.json"
        return read(path) if path.exists() else None

    def run(
        self, name: str, settings: Mapping[str, Any], work: Callable[[Path], Result | None]
    ) -> Result | None:
        """Return the result of a run; if it is not there, `work(folder)` makes it and it is kept.

        `work` returns None where another process keeps the result.
        """
        found = self.result(name, settings)
        if found is None:
            folder = self.folder(name, settings)
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / "settings.json", json.dumps(settings, indent=1))
            found = work(folder)
            if found is not None:
                write(folder / "result.json", json.dumps(found, indent=1))
        return found

    def claim(self, table: str, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Refuse to replace a table that other settings made, before any work for it."""
        self.open()
        path = self.out / f"{table}.json"
        if path.exists() and not overwrite:
            changed = changes(read(path)["settings"], json.loads(json.dumps(settings)))
            if changed:
                raise ExperimentError(
                    f"{path} was made with other settings ({'; '.join(changed)}): choose another "
                    "--out, or replace it with --overwrite; finished runs are kept either way"
                )

    def publish(self, table: str, record: Mapping[str, Any], text: str) -> None:
        """Write a table: its numbers with their settings as JSON, its text as Markdown."""
        write(self.out / f"{table}.json", json.dumps(record, indent=1) + "\n")
        write(self.out / f"{table}.md", text.rstrip("\n") + "\n")
