"""The examples, run as a person runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(script: str, *arguments: Any, launcher: tuple[str, ...] = ()) -> list[str]:
    """Return the command line of a script in examples/, by way of another launcher than Python."""
    return [sys.executable, *launcher, str(EXAMPLES / script), *map(str, arguments)]


def run(script: str, *arguments: Any, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    return subprocess.run(
        command(script, *arguments, **how), capture_output=True, text=True, check=False,
        timeout=500, env=ENVIRONMENT,
    )  # fmt: skip


def folder(out: Path, name: str) -> Path:
    """Return the folder of the one run whose name begins so."""
    (found,) = out.glob(f"runs/{name}-*")
    return found
