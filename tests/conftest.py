"""One thread, reproducible property tests, and a check of what an error message says."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script, where a shell has Ctrl-C ignored: programs that tests
    # start and interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if importlib.util.find_spec("solo") is not None:
    # solo-learn, timm and torchmetrics warn while they are imported, and warnings are errors here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("solo.methods")

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
# Mutation testing calls each test many times in one process, from fixtures of its own. All it asks
# is whether a mutant fails: it looks for no smaller example.
settings.register_profile(
    "mutation",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


Complains = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def complains() -> Complains:
    """``with complains(ValueError, "name", ("either", "or")):`` the message has every part."""

    @contextmanager
    def check(kind: type[Exception], *parts: str | tuple[str, ...]) -> Iterator[None]:
        with pytest.raises(kind) as caught:
            yield
        assert caught.type is kind
        message = str(caught.value)
        for part in parts:
            choices = (part,) if isinstance(part, str) else part
            # At the start of a word: "xtemperature" does not name `temperature`.
            found = (re.search(rf"(?<![A-Za-z]){re.escape(choice)}", message) for choice in choices)
            assert any(found), f"{choices} not in {message!r}"

    return check
