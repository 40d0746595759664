"""Hypothesis strategies and invariant checks for losses on embeddings and cluster assignments.

Needs the extra `testing` (hypothesis): `pip install "c2bin-ext[testing]"`. `import c2bin_ext` alone
never imports this module.

A loss is any callable that returns a scalar tensor, of one of three kinds: `"assignment"`,
`loss(assignments)`, (n, K) with rows that sum to 1; `"assignment_pair"`, `loss(assignments0,
assignments1)`; `"embedding_pair"`, `loss(prediction, target)`, (n, d). `check_invariants` checks
all invariants of a kind, and `check_<name>(loss, kind, **options)` one of them.
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'c2bin_ext.testing needs hypothesis ({error}): pip install "c2bin-ext[testing]"'
    ) from error

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
