"""The examples, run as a person runs them."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

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


def run_here(script: str, *arguments: Any) -> str:
    """Run a script to its end in this process, without the seconds of imports; what it printed."""
    path, shown = EXAMPLES / script, io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(path), *map(str, arguments)]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch.dict(os.environ),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(shown),
    ):
        warnings.simplefilter("ignore")
        runpy.run_path(str(path), run_name="__main__")
    return shown.getvalue()


def folder(out: Path, name: str) -> Path:
    """Return the folder of the one run whose name begins so."""
    (found,) = out.glob(f"runs/{name}-*")
    return found
