"""Hypothesis strategies and invariant checks for losses on embeddings and cluster assignments.

Needs the extra `testing` (hypothesis): `pip install "c2bin-ext[testing]"`. `import c2bin_ext` alone
never imports this module.

Three forms of losses are served, named by `kind`:

| kind | called as |
| --- | --- |
| `"assignment"` | `loss(assignments)`, (n, K), rows sum to 1 |
| `"assignment_pair"` | `loss(assignments0, assignments1)`, one matrix per view |
| `"embedding_pair"` | `loss(prediction, target)`, (n, d) |

A loss is any callable that returns a scalar tensor: a function, an `nn.Module`, a compiled one, a
lambda around another library's. `check_invariants` runs every invariant of a kind and reports
those that do not hold; `check_` and a name, such as `check_view_swap(loss, kind, **options)`, is
one of them.
"""

from collections.abc import Callable

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'c2bin_ext.testing needs hypothesis ({error}): pip install "c2bin-ext[testing]"'
    ) from error

from c2bin_ext.testing import presets
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
    check_one,
    invariants,
    parametrize_with_invariants,
)

__all__ = [
    "ASSIGNMENT_KINDS",
    "EMBEDDING_KINDS",
    "InvariantError",
    "InvariantsError",
    "LossRaisedError",
    "Report",
    "assignments",
    "check_invariants",
    "dtypes",
    "embeddings",
    "evaluate",
    "invariants",
    "paired_assignments",
    "paired_embeddings",
    "parametrize_with_invariants",
    "presets",
    "scales",
    "search",
    "shards",
]


def __getattr__(name: str) -> Callable[..., None]:
    return check_one(name)
