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
those that do not hold; each is also a function of its own.
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'c2bin_ext.testing needs hypothesis ({error}): pip install "c2bin-ext[testing]"'
    ) from error

from c2bin_ext.testing._invariants import (
    check_additive_over_shards,
    check_bounds,
    check_cluster_relabelling,
    check_column_scale,
    check_dtype,
    check_finite,
    check_gradient,
    check_instance_permutation,
    check_lower_precision,
    check_monotone_entropy,
    check_no_gradient_to_target,
    check_positive_scaling,
    check_value_at_agreement,
    check_value_at_balance,
    check_value_at_collapse,
    check_value_at_uniform,
    check_view_swap,
)
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
from c2bin_ext.testing._suite import InvariantsError, Report, check_invariants, invariants

__all__ = [
    "ASSIGNMENT_KINDS",
    "EMBEDDING_KINDS",
    "InvariantError",
    "InvariantsError",
    "LossRaisedError",
    "Report",
    "assignments",
    "check_additive_over_shards",
    "check_bounds",
    "check_cluster_relabelling",
    "check_column_scale",
    "check_dtype",
    "check_finite",
    "check_gradient",
    "check_instance_permutation",
    "check_invariants",
    "check_lower_precision",
    "check_monotone_entropy",
    "check_no_gradient_to_target",
    "check_positive_scaling",
    "check_value_at_agreement",
    "check_value_at_balance",
    "check_value_at_collapse",
    "check_value_at_uniform",
    "check_view_swap",
    "dtypes",
    "embeddings",
    "evaluate",
    "invariants",
    "paired_assignments",
    "paired_embeddings",
    "scales",
    "search",
    "shards",
]
