"""The invariants: each check looks for an input on which a loss breaks one of them.

Inputs are float64 unless a check is about dtypes, so that tolerances can be tight.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from c2bin_ext.testing import _strategies as strategies
from c2bin_ext.testing._search import (
    Example,
    Loss,
    calling,
    differentiate,
    evaluate,
    search,
    show,
)

Kind: TypeAlias = Literal["assignment", "assignment_pair", "embedding_pair"]
Value: TypeAlias = float | Callable[[int], float]
Shapes: TypeAlias = Sequence[tuple[int, int]] | None
Device: TypeAlias = str | torch.device
Statistic: TypeAlias = Callable[..., Tensor | Sequence[Tensor]]

NAMES: dict[str, tuple[str, ...]] = {
    "assignment": ("assignments",),
    "assignment_pair": ("assignments0", "assignments1"),
    "embedding_pair": ("prediction", "target"),
}
ALL_KINDS = tuple(NAMES)
ON_ASSIGNMENTS = ALL_KINDS[:2]
ON_PAIRS = ALL_KINDS[1:]

# Entries whose squares do not vanish in float32: on either side of where a loss takes a norm for
# zero it may change with the scale, and neither is wrong.
_ORDINARY = ("one_hot", "ratios", "uniform", "collapsed", "constant", "dead_cluster")
_FACTORS = (1.0, 2.0, 0.5, 100.0, 0.01)
# C2BIN's default temperature, which the default values are for.
_TEMPERATURE = 0.5


def check_instance_permutation(
    loss: Loss,
    *,
    kind: Kind = "assignment_pair",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that the order of the instances of a batch does not matter.

    Formula: `L(P[π]) = L(P)` for every permutation π of the rows, the same for both views.

    Args:
        loss: what to check.
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6, K 2 to 5 and d 1 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import BCAContrastiveLoss
        >>> from c2bin_ext.testing import check_instance_permutation
        >>> check_instance_permutation(BCAContrastiveLoss())

    Source: C2BIN, Eq. 1, 4 and 5 are sums over instances.
    """
    names = _names(kind, ALL_KINDS)

    def problem(example: Example) -> str | None:
        inputs, order = _inputs(example, names), example["permutation"]
        expected = evaluate(loss, inputs)
        found = evaluate(loss, [tensor[order] for tensor in inputs])
        return _differs("after the permutation", found, expected, rtol, atol)

    examples = _examples(kind, shapes, device, extra=_row_permutation)
    search(
        "instance_permutation",
        "L(rows in any order) = L(rows)",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_cluster_relabelling(
    loss: Loss,
    *,
    kind: Kind = "assignment_pair",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that the names of the clusters do not matter.

    Formula: `L(P[:, π]) = L(P)` for every permutation π of the columns, the same for both views.

    Args:
        loss: what to check.
        kind: `"assignment"` or `"assignment_pair"`.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6 and K 2 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> from c2bin_ext.testing import check_cluster_relabelling
        >>> check_cluster_relabelling(ClusterEntropyRegularizer(), kind="assignment")

    Source: C2BIN, Eq. 4 and 5 are averages and sums over clusters.
    """
    names = _names(kind, ON_ASSIGNMENTS)

    def problem(example: Example) -> str | None:
        inputs, order = _inputs(example, names), example["permutation"]
        expected = evaluate(loss, inputs)
        found = evaluate(loss, [tensor[:, order] for tensor in inputs])
        return _differs("after the relabelling", found, expected, rtol, atol)

    examples = _examples(kind, shapes, device, extra=_column_permutation)
    search(
        "cluster_relabelling",
        "L(columns in any order) = L(columns)",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_view_swap(
    loss: Loss,
    *,
    kind: Kind = "assignment_pair",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that neither view is preferred.

    Formula: `L(P', P'') = L(P'', P')`.

    Args:
        loss: what to check.
        kind: `"assignment_pair"` or `"embedding_pair"`.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6, K 2 to 5 and d 1 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import BCAContrastiveLoss
        >>> from c2bin_ext.testing import check_view_swap
        >>> check_view_swap(BCAContrastiveLoss(symmetric=True))

    Source: C2BIN, Eq. 4 averaged over both directions; the printed form has one.
    """
    names = _names(kind, ON_PAIRS)

    def problem(example: Example) -> str | None:
        inputs = _inputs(example, names)
        expected = evaluate(loss, inputs)
        return _differs("swapped", evaluate(loss, inputs[::-1]), expected, rtol, atol)

    examples = _examples(kind, shapes, device)
    search(
        "view_swap",
        "L(view 0, view 1) = L(view 1, view 0)",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_bounds(
    loss: Loss,
    *,
    kind: Kind = "assignment_pair",
    lower: Value | None = None,
    upper: Value | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that values stay between two bounds.

    Formula: `lower(K) <= L <= upper(K)`.

    Args:
        loss: what to check.
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.
        lower: a number or a function of K (of d for embeddings), `-math.inf` for none. The default
            is C2BIN's: 0; for `"assignment_pair"` `log(1 + (K - 1) exp(-1/τ))` with τ = 0.5.
        upper: likewise. The default is log K for `"assignment"`, `log(1 + (K - 1) exp(1/τ))` for
            `"assignment_pair"` and 2 for `"embedding_pair"`.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6, K 2 to 5 and d 1 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import BootstrapAlignmentLoss
        >>> from c2bin_ext.testing import check_bounds
        >>> check_bounds(BootstrapAlignmentLoss(), kind="embedding_pair", lower=0, upper=2)

    Source: C2BIN, Eq. 1 (a cosine), Eq. 4 (cosines of columns in [0, 1]) and Eq. 5 (an entropy).
    """
    names = _names(kind, ALL_KINDS)
    least, largest = _BOUNDS[kind]
    lower, upper = least if lower is None else lower, largest if upper is None else upper

    def problem(example: Example) -> str | None:
        inputs = _inputs(example, names)
        columns = inputs[0].shape[1]
        low, high = _at(lower, columns), _at(upper, columns)
        found = evaluate(loss, inputs).item()
        if found >= low - _slack(low, rtol, atol) and found <= high + _slack(high, rtol, atol):
            return None
        return f"{_text(found)}, outside of [{_text(low)}, {_text(high)}]"

    examples = _examples(kind, shapes, device)
    search(
        "bounds",
        "lower <= L <= upper",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_value_at_agreement(
    loss: Loss,
    *,
    kind: Kind = "assignment_pair",
    value: Value | None = None,
    rows_per_cluster: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check the value where both views agree perfectly.

    Formula: `L(Y, Y) = value(K)` for one-hot Y with equally many rows in every cluster; for
    embeddings `L(α z, z) = value(d)` with α > 0.

    Args:
        loss: what to check.
        kind: `"assignment_pair"` or `"embedding_pair"`.
        value: what is expected, a number or a function of K (of d for embeddings). The default is
            C2BIN's: `log(1 + (K - 1) exp(-1/τ))` with τ = 0.5 for assignments, 0 for embeddings.
        rows_per_cluster: rows in each cluster, for a value that depends on their number; by default
            1 to 3. `shapes` overrides it, and its n must be a multiple of K.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default K is
            2 to 4.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> import math
        >>> from c2bin_ext import BCAContrastiveLoss
        >>> from c2bin_ext.testing import check_value_at_agreement
        >>> def value(clusters, temperature=0.2):
        ...     return math.log1p((clusters - 1) * math.exp(-1 / temperature))
        >>> check_value_at_agreement(BCAContrastiveLoss(temperature=0.2), value=value)

    Source: C2BIN, Eq. 4 with S = I/τ, and Eq. 1 with cosine 1.
    """
    names = _names(kind, ON_PAIRS)
    expected: Value = value if value is not None else _AGREEMENT[kind]

    def problem(example: Example) -> str | None:
        inputs = _inputs(example, names)
        return _misses(evaluate(loss, inputs), expected, inputs[0].shape[1], rtol, atol)

    if kind == "embedding_pair":
        examples = _aligned(shapes, device)
    else:
        examples = _balanced(names, rows_per_cluster, shapes, device)
    search(
        "value_at_agreement",
        "L(y, y) = value",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_value_at_balance(
    loss: Loss,
    *,
    value: Value = 0.0,
    rows_per_cluster: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check the value of a regularizer where hard clusters are balanced.

    Formula: `L(Y) = value(K)` for one-hot Y with equally many rows in every cluster.

    Args:
        loss: what to check.
        value: what is expected, a number or a function of K. The default is C2BIN's, 0.
        rows_per_cluster: rows in each cluster; by default 1 to 3. `shapes` overrides it, and its n
            must be a multiple of K.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default K is
            2 to 4.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> from c2bin_ext.testing import check_value_at_balance
        >>> check_value_at_balance(ClusterEntropyRegularizer())

    Source: C2BIN, Eq. 5 with H = log K.
    """
    names = NAMES["assignment"]

    def problem(example: Example) -> str | None:
        inputs = _inputs(example, names)
        return _misses(evaluate(loss, inputs), value, inputs[0].shape[1], rtol, atol)

    examples = _balanced(names, rows_per_cluster, shapes, device)
    search(
        "value_at_balance",
        "L(balanced one-hot) = value",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_value_at_collapse(
    loss: Loss,
    *,
    kind: Kind = "assignment_pair",
    value: Value | None = None,
    rows: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check the value where one cluster holds every instance.

    Formula: `L(P) = value(K)` with `P[i, k] = 1` for one k and all i, the same in both views.

    Args:
        loss: what to check.
        kind: `"assignment"` or `"assignment_pair"`.
        value: what is expected, a number or a function of K. The default is C2BIN's: log K for
            `"assignment"`; `(log(1 + (K - 1) exp(-1/τ)) + (K - 1) log K) / K` with τ = 0.5 for
            `"assignment_pair"`, since the cosine with an empty column is 0.
        rows: n, for a value that depends on it; by default 1 to 6. `shapes` overrides it.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6 and K 2 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> import math
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> from c2bin_ext.testing import check_value_at_collapse
        >>> check_value_at_collapse(ClusterEntropyRegularizer(), kind="assignment", value=math.log)

    Source: C2BIN, Eq. 4 and 5.
    """
    names = _names(kind, ON_ASSIGNMENTS)
    expected: Value = value if value is not None else _COLLAPSE[kind]

    def problem(example: Example) -> str | None:
        inputs = _inputs(example, names)
        return _misses(evaluate(loss, inputs), expected, inputs[0].shape[1], rtol, atol)

    examples = _same(names, "collapsed", rows, shapes, device)
    search(
        "value_at_collapse",
        "L(all in one cluster) = value",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_value_at_uniform(
    loss: Loss,
    *,
    kind: Kind = "assignment_pair",
    value: Value | None = None,
    rows: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check the value where every assignment is uniform.

    Formula: `L(P) = value(K)` with `P[i, k] = 1/K`, in both views.

    Args:
        loss: what to check.
        kind: `"assignment"` or `"assignment_pair"`.
        value: what is expected, a number or a function of K. The default is C2BIN's: 0 for
            `"assignment"`, log K for `"assignment_pair"`.
        rows: n, for a value that depends on it; by default 1 to 6. `shapes` overrides it.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6 and K 2 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> import math
        >>> from c2bin_ext import BCAContrastiveLoss
        >>> from c2bin_ext.testing import check_value_at_uniform
        >>> check_value_at_uniform(BCAContrastiveLoss(), value=math.log)

    Source: C2BIN, Eq. 4 (all columns alike: chance level) and Eq. 5 (equal masses).
    """
    names = _names(kind, ON_ASSIGNMENTS)
    expected: Value = value if value is not None else _UNIFORM[kind]

    def problem(example: Example) -> str | None:
        inputs = _inputs(example, names)
        return _misses(evaluate(loss, inputs), expected, inputs[0].shape[1], rtol, atol)

    examples = _same(names, "uniform", rows, shapes, device)
    search(
        "value_at_uniform",
        "L(1/K everywhere) = value",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_positive_scaling(
    loss: Loss,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that the lengths of embeddings do not matter.

    Formula: `L(diag(α) p, diag(β) z) = L(p, z)` for `α, β > 0`, one factor for each row.

    Args:
        loss: what to check.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, d) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6 and d 1 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import BootstrapAlignmentLoss
        >>> from c2bin_ext.testing import check_positive_scaling
        >>> check_positive_scaling(BootstrapAlignmentLoss())

    Source: C2BIN, Eq. 1 is a cosine.
    """
    names = NAMES["embedding_pair"]

    def problem(example: Example) -> str | None:
        inputs = _inputs(example, names)
        factors = [torch.as_tensor(example[f"{name}_scale"]).to(inputs[0]) for name in names]
        expected = evaluate(loss, inputs)
        scaled = [x * factor[:, None] for x, factor in zip(inputs, factors, strict=True)]
        return _differs("scaled", evaluate(loss, scaled), expected, rtol, atol)

    kinds = ("plain", "constant")
    extra = partial(_factors, names=names, axis=0)
    examples = _examples("embedding_pair", shapes, device, kinds=kinds, extra=extra)
    search(
        "positive_scaling",
        "L(α p, β z) = L(p, z) for α, β > 0",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_column_scale(
    loss: Loss,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that the lengths of batch-wise cluster assignment vectors do not matter.

    Formula: `L(P' diag(α), P'' diag(β)) = L(P', P'')` for `α, β > 0`, one factor for each
    column. Rows of the scaled matrices do not sum to 1.

    Args:
        loss: what to check.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6 and K 2 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import BCAContrastiveLoss
        >>> from c2bin_ext.testing import check_column_scale
        >>> check_column_scale(BCAContrastiveLoss(similarity="cosine"))

    Source: C2BIN, Eq. 4 with cosine similarity; the dot product as printed does not keep it.
    """
    names = NAMES["assignment_pair"]

    def problem(example: Example) -> str | None:
        inputs = _inputs(example, names)
        factors = [torch.as_tensor(example[f"{name}_scale"]).to(inputs[0]) for name in names]
        expected = evaluate(loss, inputs)
        scaled = [x * factor for x, factor in zip(inputs, factors, strict=True)]
        return _differs("scaled", evaluate(loss, scaled), expected, rtol, atol)

    extra = partial(_factors, names=names, axis=1)
    examples = _examples("assignment_pair", shapes, device, kinds=_ORDINARY, extra=extra)
    search(
        "column_scale",
        "L(α_k c'_k, β_k c''_k) = L(c'_k, c''_k) for α, β > 0",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_monotone_entropy(
    loss: Loss,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that evening out the masses of two clusters never raises a regularizer.

    Formula: `L(P after) <= L(P)` where mass `t (s_a - s_b)`, `0 < t <= 1`, moves from a
    heavier cluster a to a lighter cluster b, with `s_k = Σ_i P[i, k]`.

    Args:
        loss: what to check.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6 and K 2 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> from c2bin_ext.testing import check_monotone_entropy
        >>> check_monotone_entropy(ClusterEntropyRegularizer())

    Source: C2BIN, Eq. 5: H is Schur-concave, so its negative falls. A flipped sign fails here.
    """

    def problem(example: Example) -> str | None:
        before = example["assignments"]
        heavier, lighter = example["clusters"]
        mass = before.sum(dim=0)
        if mass[heavier] < mass[lighter]:
            heavier, lighter = lighter, heavier
        gap = mass[heavier] - mass[lighter]
        # The floor is for two empty clusters, between which nothing moves.
        moved = before[:, heavier] * (
            example["part_of_gap"] * gap / mass[heavier].clamp_min(1e-300)
        )
        after = before.clone()
        after[:, heavier] -= moved
        after[:, lighter] += moved
        old, new = evaluate(loss, [before]).item(), evaluate(loss, [after]).item()
        if new <= old + _slack(old, rtol, atol):
            return None
        return (
            f"moving mass {moved.sum().item():.6g} from column {heavier} to column {lighter} "
            f"raised it from {_text(old)} to {_text(new)}"
        )

    examples = _examples("assignment", shapes, device, extra=_transfer)
    search(
        "monotone_entropy",
        "L does not rise when mass moves to a lighter cluster",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_finite(
    loss: Loss,
    *,
    kind: Kind = "assignment_pair",
    dtypes: Sequence[torch.dtype] = strategies.DTYPES,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that value and gradient are finite, at the extremes too.

    Formula: `|L| < ∞` and `|∂L/∂P| < ∞` for one-hot, uniform, collapsed, dead-cluster, zero,
    huge and tiny inputs and n = 1, in every dtype.

    Args:
        loss: what to check.
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.
        dtypes: of the inputs; all four of training by default.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6, K 2 to 5 and d 1 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import BCAContrastiveLoss
        >>> from c2bin_ext.testing import check_finite
        >>> check_finite(BCAContrastiveLoss())

    Source: what every loss of `c2bin_ext` keeps; of Eq. 5, log 0 of an empty cluster.
    """
    names = _names(kind, ALL_KINDS)

    def problem(example: Example) -> str | None:
        value, gradients = differentiate(loss, _inputs(example, names))
        if not torch.isfinite(value).all():
            return f"value {value.item()}"
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None and not torch.isfinite(gradient).all():
                return f"gradient of {name} {show(gradient)}"
        return None

    # One search for each dtype: each sees all the extremes.
    for dtype in dtypes:
        examples = _examples(kind, shapes, device, dtype=dtype)
        search(
            "finite",
            "value and gradient are finite",
            loss,
            examples,
            problem,
            max_examples=max_examples,
            derandomize=derandomize,
        )


def check_gradient(
    loss: Loss,
    *,
    kind: Kind = "assignment_pair",
    rtol: float = 1e-3,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check the gradient against finite differences.

    Formula: `∂L/∂z` by autograd is `(L(z + ε) - L(z - ε)) / 2ε`, with `P = softmax(z)` for
    assignments; of the prediction alone for embeddings.

    Args:
        loss: what to check.
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n
            and K are at most 4, for speed.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import BCAContrastiveLoss
        >>> from c2bin_ext.testing import check_gradient
        >>> check_gradient(BCAContrastiveLoss(), max_examples=10)

    Source: `torch.autograd.gradcheck`, in float64.
    """
    names = _names(kind, ALL_KINDS)

    def wrong(inputs: list[Tensor]) -> str | None:
        fixed = inputs[1:] if kind == "embedding_pair" else []
        leaves = [x.clone().requires_grad_() for x in inputs[: len(inputs) - len(fixed)]]

        def of_leaves(*points: Tensor) -> Tensor:
            if kind != "embedding_pair":
                points = tuple(point.softmax(dim=1) for point in points)
            with calling(), warnings.catch_warnings():
                # What torch.compile asks of inputs that are no leaves, with warnings as errors.
                warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor")
                return loss(*points, *(x.clone() for x in fixed))

        try:
            gradcheck(of_leaves, leaves, rtol=rtol, atol=atol)
        except GradcheckError as error:
            return " ".join(str(error).split())
        return None

    def problem(example: Example) -> str | None:
        inputs = _inputs(example, [f"logits of {name}" if soft else name for name in names])
        found = wrong(inputs)
        if found is None:
            return None
        # Ties of small integers sit on the kinks of a max or a hinge, where there is no gradient
        # to compare with. A wrong gradient is as wrong a little further on.
        generic = [
            x + 0.01 * torch.arange(1, x.numel() + 1).to(x).reshape(x.shape).mul(37 + i).sin()
            for i, x in enumerate(inputs)
        ]
        return found if wrong(generic) is not None else None

    soft = kind != "embedding_pair"
    if soft:
        examples = _logits(names, shapes, device)
    else:
        examples = _examples(kind, shapes, device, kinds=("plain", "constant"))
    search(
        "gradient",
        "autograd = finite differences",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_no_gradient_to_target(
    loss: Loss,
    *,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that targets never get a gradient.

    Formula: `∂L/∂z = 0` for the second argument of `L(p, z)`.

    Args:
        loss: what to check.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, d) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6 and d 1 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import BootstrapAlignmentLoss
        >>> from c2bin_ext.testing import check_no_gradient_to_target
        >>> check_no_gradient_to_target(BootstrapAlignmentLoss())

    Source: C2BIN, the stop-gradient sg(z) of Eq. 1.
    """
    names = NAMES["embedding_pair"]

    def problem(example: Example) -> str | None:
        _, (_, gradient) = differentiate(loss, _inputs(example, names))
        # Where the gradient vanishes anyhow, its rounding error would make a poor example.
        if gradient is None or gradient.abs().max() <= 1e-9:
            return None
        return f"gradient of target {show(gradient)}"

    examples = _examples("embedding_pair", shapes, device, kinds=("plain", "constant"))
    search(
        "no_gradient_to_target",
        "dL/d target = 0",
        loss,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def check_dtype(
    loss: Loss,
    *,
    kind: Kind = "assignment_pair",
    dtypes: Sequence[torch.dtype] = strategies.DTYPES,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that the loss is 0-dim, float32 for half inputs, and float64 for float64.

    Formula: `L.ndim = 0`; `L.dtype` is float64 for float64 inputs and float32 for all others.

    Args:
        loss: what to check.
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.
        dtypes: of the inputs; all four of training by default.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6, K 2 to 5 and d 1 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import BCAContrastiveLoss
        >>> from c2bin_ext.testing import check_dtype
        >>> check_dtype(BCAContrastiveLoss())

    Source: what every loss of `c2bin_ext` keeps.
    """
    names = _names(kind, ALL_KINDS)

    def problem(example: Example) -> str | None:
        inputs = _inputs(example, names)
        value = evaluate(loss, inputs)
        wide = torch.float64 if inputs[0].dtype is torch.float64 else torch.float32
        if value.ndim or value.dtype is not wide:
            return f"shape {tuple(value.shape)}, {value.dtype}, in place of (), {wide}"
        return None

    for dtype in dtypes:
        kinds = _ORDINARY if kind in ON_ASSIGNMENTS else ("plain",)
        examples = _examples(kind, shapes, device, dtype=dtype, kinds=kinds)
        search(
            "dtype",
            "0-dim, float32 at least, float64 stays",
            loss,
            examples,
            problem,
            max_examples=max_examples,
            derandomize=derandomize,
        )


def check_lower_precision(
    loss: Loss,
    *,
    kind: Kind = "assignment_pair",
    dtypes: Sequence[torch.dtype] = strategies.DTYPES[2:],
    autocast: bool = True,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that half inputs and autocast give what float32 gives.

    Formula: `L(x.half()) = L(x.half().float())`, and `L(x)` is the same under autocast to bfloat16.

    Args:
        loss: what to check.
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.
        dtypes: the lower precisions.
        autocast: whether to compare float32 inputs with and without autocast too.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6, K 2 to 5 and d 1 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext import BCAContrastiveLoss
        >>> from c2bin_ext.testing import check_lower_precision
        >>> check_lower_precision(BCAContrastiveLoss())

    Source: what every loss of `c2bin_ext` keeps: float32 inside.
    """
    names = _names(kind, ALL_KINDS)

    def cast(example: Example) -> str | None:
        inputs = _inputs(example, names)
        expected = evaluate(loss, [tensor.float() for tensor in inputs])
        return _differs(f"in {inputs[0].dtype}", evaluate(loss, inputs), expected, rtol, atol)

    def under_autocast(example: Example) -> str | None:
        inputs = _inputs(example, names)
        expected = evaluate(loss, inputs)
        with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
            found = evaluate(loss, inputs)
        return _differs("under autocast to bfloat16", found, expected, rtol, atol)

    runs = [(dtype, cast) for dtype in dtypes]
    if autocast:
        runs.append((torch.float32, under_autocast))
    kinds = (*_ORDINARY, "softmax") if kind in ON_ASSIGNMENTS else ("plain", "constant")
    for dtype, problem in runs:
        examples = _examples(kind, shapes, device, dtype=dtype, kinds=kinds)
        search(
            "lower_precision",
            "L in lower precision = L in float32",
            loss,
            examples,
            problem,
            max_examples=max_examples,
            derandomize=derandomize,
        )


def check_additive_over_shards(
    statistic: Statistic,
    *,
    kind: Kind = "assignment",
    loss: Loss | None = None,
    from_sums: Loss | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_examples: int = 50,
    derandomize: bool = True,
    shapes: Shapes = None,
    device: Device = "cpu",
) -> None:
    """Check that a batch statistic adds up over shards, and that a loss is a function of the sums.

    Formula: `T(P) = Σ_r T(P_r)` for every partition of the rows into parts `P_r`; with a loss,
    `L(P) = f(Σ_r T(P_r))` and the gradients agree too, which is what lets ranks exchange sums
    instead of features.

    Args:
        statistic: T, returns a tensor or a sequence of tensors.
        kind: `"assignment"`, `"assignment_pair"` or `"embedding_pair"`.
        loss: the loss of the whole batch, to compare with `from_sums`.
        from_sums: f, called with what the statistic returns, summed over shards.
        rtol: tolerance relative to the expected value.
        atol: absolute tolerance.
        max_examples: how many examples to try before shrinking.
        derandomize: try the same examples at every run; False looks elsewhere each time.
        shapes: the (n, K) to draw from, such as one alone for a compiled loss; by default n is
            1 to 6, K 2 to 5 and d 1 to 5.
        device: where the inputs lie.

    Returns:
        None, where no counterexample was found.

    Raises:
        InvariantError: the invariant does not hold.
        LossRaisedError: the loss raised.
        ValueError: an argument that does not fit.

    Examples:
        >>> from c2bin_ext.functional import cluster_mass
        >>> from c2bin_ext.testing import check_additive_over_shards
        >>> check_additive_over_shards(cluster_mass)

    Source: C2BIN, `C'ᵀC''` and column norms of Eq. 4, masses of Eq. 5; `c2bin_ext.distributed`.
    """
    names = _names(kind, ALL_KINDS)
    if (loss is None) != (from_sums is None):
        raise ValueError("loss, from_sums: expected both or neither")

    def over_shards(sizes: Sequence[int], *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        totals: list[Tensor] = []
        single = True
        for parts in zip(*(torch.split(x, list(sizes)) for x in inputs), strict=True):
            statistics = statistic(*parts)
            single = isinstance(statistics, Tensor)
            new = _listed(statistics)
            totals = [a + b for a, b in zip(totals, new, strict=True)] if totals else new
        return totals[0] if single else tuple(totals)

    def problem(example: Example) -> str | None:
        inputs, sizes = _inputs(example, names), example["shards"]
        with calling():
            whole = over_shards([inputs[0].shape[0]], *(x.clone() for x in inputs))
            total = over_shards(sizes, *(x.clone() for x in inputs))
        for expected, found in zip(_listed(whole), _listed(total), strict=True):
            if not torch.allclose(found, expected, rtol=rtol, atol=atol):
                return f"sum over shards {show(found)}, whole {show(expected)}"
        if loss is None or from_sums is None:
            return None

        def sharded(*leaves: Tensor) -> Tensor:
            return from_sums(over_shards(sizes, *leaves))

        value, slopes = differentiate(loss, inputs)
        again, slopes_again = differentiate(sharded, inputs)
        if (gap := _differs("from sums over shards", again, value, rtol, atol)) is not None:
            return gap
        for name, tensor, a, b in zip(names, inputs, slopes, slopes_again, strict=True):
            want, have = (torch.zeros_like(tensor) if x is None else x for x in (a, b))
            if not torch.allclose(have, want, rtol=rtol, atol=atol):
                return f"gradient of {name} from sums {show(have)}, whole {show(want)}"
        return None

    kinds = _ORDINARY if kind in ON_ASSIGNMENTS else ("plain", "constant", "zero_row")
    examples = _examples(kind, shapes, device, kinds=kinds, extra=_shards)
    search(
        "additive_over_shards",
        "T(whole) = Σ_r T(shard r)",
        statistic,
        examples,
        problem,
        max_examples=max_examples,
        derandomize=derandomize,
    )


def _agreement(clusters: int) -> float:
    return math.log1p((clusters - 1) * math.exp(-1 / _TEMPERATURE))


def _collapse(clusters: int) -> float:
    return (_agreement(clusters) + (clusters - 1) * math.log(clusters)) / clusters


def _worst(clusters: int) -> float:
    return math.log1p((clusters - 1) * math.exp(1 / _TEMPERATURE))


_BOUNDS: dict[str, tuple[Value, Value]] = {
    "assignment": (0.0, math.log),
    "assignment_pair": (_agreement, _worst),
    "embedding_pair": (0.0, 2.0),
}
_AGREEMENT: dict[str, Value] = {"assignment_pair": _agreement, "embedding_pair": 0.0}
_COLLAPSE: dict[str, Value] = {"assignment": math.log, "assignment_pair": _collapse}
_UNIFORM: dict[str, Value] = {"assignment": 0.0, "assignment_pair": math.log}


def _names(kind: str, served: Sequence[str]) -> tuple[str, ...]:
    if kind not in served:
        raise ValueError(f"kind: expected one of {tuple(served)}, got {kind!r}")
    return NAMES[kind]


def _inputs(example: Example, names: Sequence[str]) -> list[Tensor]:
    return [example[name] for name in names]


def _listed(statistics: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [statistics] if isinstance(statistics, Tensor) else list(statistics)


def _at(value: Value, columns: int) -> float:
    return float(value(columns) if callable(value) else value)


def _text(number: float) -> str:
    # Adding 0 turns -0 into 0.
    return f"{number + 0.0:.9g}"


def _slack(expected: float, rtol: float, atol: float) -> float:
    return atol + rtol * abs(expected) if math.isfinite(expected) else 0.0


def _differs(where: str, found: Tensor, expected: Tensor, rtol: float, atol: float) -> str | None:
    new, old = found.item(), expected.item()
    # Equality first, for infinities. NaN fails both.
    if new == old or abs(new - old) <= _slack(old, rtol, atol):
        return None
    return f"{_text(old)}, and {where} {_text(new)}"


def _misses(found: Tensor, value: Value, columns: int, rtol: float, atol: float) -> str | None:
    new, wanted = found.item(), _at(value, columns)
    if new == wanted or abs(new - wanted) <= _slack(wanted, rtol, atol):
        return None
    return f"{_text(new)}, expected {_text(wanted)}"


Extra: TypeAlias = Callable[[tuple[int, int]], "st.SearchStrategy[Example]"]


@st.composite
def _examples(
    draw: st.DrawFn,
    kind: str,
    shapes: Shapes,
    device: Device,
    *,
    dtype: torch.dtype = torch.float64,
    kinds: Sequence[str] | None = None,
    extra: Extra | None = None,
) -> Example:
    """Inputs of a loss by name, and what `extra` draws for their shape."""
    options: dict[str, Any] = {"dtype": dtype}
    if kinds is not None:
        options["kinds"] = kinds
    if shapes is not None:
        rows, columns = draw(st.sampled_from(list(shapes)))
        options |= {"rows": rows, "features" if kind == "embedding_pair" else "clusters": columns}
    tensors: tuple[Tensor, ...]
    if kind == "assignment":
        tensors = (draw(strategies.assignments(**options)),)
    elif kind == "assignment_pair":
        tensors = draw(strategies.paired_assignments(**options))
    else:
        tensors = draw(strategies.paired_embeddings(**options))
    example: Example = dict(zip(NAMES[kind], (x.to(device) for x in tensors), strict=True))
    if extra is not None:
        rows, columns = tensors[0].shape
        example |= draw(extra((rows, columns)))
    return example


def _row_permutation(shape: tuple[int, int]) -> st.SearchStrategy[Example]:
    return st.fixed_dictionaries({"permutation": st.permutations(range(shape[0]))})


def _column_permutation(shape: tuple[int, int]) -> st.SearchStrategy[Example]:
    return st.fixed_dictionaries({"permutation": st.permutations(range(shape[1]))})


def _factors(
    shape: tuple[int, int], *, names: Sequence[str], axis: int
) -> st.SearchStrategy[Example]:
    # One row or column at a time: compositions of these are all scalings, and a drawn index leaves
    # hypothesis free to shrink the shape, where a drawn list of factors would not.
    place, factor = st.integers(0, shape[axis] - 1), st.sampled_from(_FACTORS)

    def factors(drawn: tuple[int, float]) -> list[float]:
        return [drawn[1] if at == drawn[0] else 1.0 for at in range(shape[axis])]

    scaled = st.tuples(place, factor).map(factors)
    return st.fixed_dictionaries({f"{name}_scale": scaled for name in names})


def _transfer(shape: tuple[int, int]) -> st.SearchStrategy[Example]:
    clusters = st.permutations(range(shape[1])).map(lambda order: tuple(order[:2]))
    return st.fixed_dictionaries(
        {"clusters": clusters, "part_of_gap": st.sampled_from((0.5, 1.0, 0.25))}
    )


def _shards(shape: tuple[int, int]) -> st.SearchStrategy[Example]:
    return st.fixed_dictionaries({"shards": strategies.shards(shape[0])})


@st.composite
def _balanced(
    draw: st.DrawFn,
    names: Sequence[str],
    rows_per_cluster: int | None,
    shapes: Shapes,
    device: Device,
) -> Example:
    if shapes is not None:
        rows, clusters = draw(st.sampled_from(list(shapes)))
        if rows % clusters:
            raise ValueError(f"shapes: expected n a multiple of K, got {(rows, clusters)}")
        repeats = rows // clusters
    else:
        clusters = draw(st.integers(2, 4))
        size = (1, 3) if rows_per_cluster is None else rows_per_cluster
        repeats = draw(strategies.size("rows_per_cluster", size, 1))
    labels = draw(st.permutations(list(range(clusters)) * repeats))
    hard = torch.eye(clusters, dtype=torch.float64, device=device)[labels]
    return {name: hard.clone() for name in names}


@st.composite
def _same(
    draw: st.DrawFn,
    names: Sequence[str],
    assignment_kind: str,
    rows: int | None,
    shapes: Shapes,
    device: Device,
) -> Example:
    fixed = shapes
    if fixed is None and rows is not None:
        fixed = [(rows, clusters) for clusters in range(2, 6)]
    example: Example = draw(_examples("assignment", fixed, device, kinds=[assignment_kind]))
    return {name: example["assignments"].clone() for name in names}


@st.composite
def _aligned(draw: st.DrawFn, shapes: Shapes, device: Device) -> Example:
    kinds = ("plain", "constant")
    example: Example = draw(_examples("embedding_pair", shapes, device, kinds=kinds))
    target = example["prediction"]
    return {"prediction": target * draw(st.sampled_from(_FACTORS)), "target": target}


@st.composite
def _logits(draw: st.DrawFn, names: Sequence[str], shapes: Shapes, device: Device) -> Example:
    sizes = [(n, k) for n in range(1, 5) for k in range(2, 5)] if shapes is None else list(shapes)
    rows, clusters = draw(st.sampled_from(sizes))
    row = st.lists(st.integers(-2, 2), min_size=clusters, max_size=clusters)
    matrix = st.lists(row, min_size=rows, max_size=rows)
    return {
        f"logits of {name}": torch.tensor(draw(matrix), dtype=torch.float64, device=device)
        for name in names
    }
