"""The examples on the path, as running one of them puts them there."""

from __future__ import annotations

import sys
import warnings

import pytest
from scripts import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
with warnings.catch_warnings():
    # The hosts warn while they are imported, and warnings are errors here.
    warnings.simplefilter("ignore")
    pytest.importorskip("lightly")
    pytest.importorskip("matplotlib")
    import pytorch_lightning  # noqa: F401
