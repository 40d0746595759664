"""The examples on the path, as running one of them puts them there."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
with warnings.catch_warnings():
    # lightly and Lightning warn while they are imported, and warnings are errors here.
    warnings.simplefilter("ignore")
    pytest.importorskip("lightly")
    pytest.importorskip("matplotlib")


@pytest.fixture(scope="session")
def run() -> Any:
    """Run a script as a person does: `run("demo.py", "--smoke")`."""

    def call(script: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
        options = {"timeout": 500, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, **options}
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    return call
