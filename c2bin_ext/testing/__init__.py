"""Hypothesis strategies and invariant checks for losses on embeddings and cluster assignments.

A loss is any callable that returns a scalar tensor, of a kind: `"assignment"`, `loss(view)`,
(n, K) with rows that sum to 1; `"assignment_pair"`, `loss(view0, view1)`; `"embedding_pair"`,
`loss(prediction, target)`, (n, d). `check_<name>(loss, kind, **options)` checks one invariant.
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError('expected hypothesis: pip install "c2bin-ext[testing]"') from error

from c2bin_ext.testing import presets
from c2bin_ext.testing._invariants import REGISTRY, Invariant
from c2bin_ext.testing._search import InvariantError, LossRaisedError, evaluate, search
from c2bin_ext.testing._strategies import (
    ASSIGNMENT_KINDS,
    EMBEDDING_KINDS,
    assignments,
    dtypes,
    embeddings,
    paired_assignments,
    paired_embeddings,
    scales,
    shards,
)
from c2bin_ext.testing._suite import (
    InvariantsError,
    Report,
    check_invariants,
    invariants,
    parametrize_with_invariants,
)

__all__ = ["ASSIGNMENT_KINDS", "EMBEDDING_KINDS", "InvariantError", "InvariantsError"]
__all__ += ["LossRaisedError", "Report", "assignments", "check_invariants", "dtypes", "embeddings"]
__all__ += ["evaluate", "invariants", "paired_assignments", "paired_embeddings"]
__all__ += ["parametrize_with_invariants", "presets", "scales", "search", "shards"]


def __getattr__(name: str) -> Invariant:
    if name.startswith("check_") and name.removeprefix("check_") in REGISTRY:
        return REGISTRY[name.removeprefix("check_")]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
