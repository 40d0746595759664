"""Doctests of an adapter run where its host is installed."""

from __future__ import annotations

import importlib.util
import warnings

collect_ignore_glob = []

if importlib.util.find_spec("solo") is None:
    collect_ignore_glob += ["c2bin_solo/*", "hydra_plugins/*"]
else:
    # solo-learn and timm warn while they are imported, and warnings are errors here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import solo.methods  # noqa: F401
