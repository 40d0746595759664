"""One thread, reproducible property tests, and a check of what an error message says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

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
            assert any(choice in message for choice in choices), f"{choices} not in {message!r}"

    return check
