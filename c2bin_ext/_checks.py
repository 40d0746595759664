"""Checks of arguments: every message names the argument, what came and what was expected.

Only shapes, dtypes and devices are read, so that no check waits for a GPU and none breaks a graph.
Values are read by `validate_assignments` and `validate_finite`, for `validate_args=True`, and by
`not_logits` where that waits for nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from c2bin_ext._numerics import at_least_float32, is_eager, is_readable

# A softmax in bfloat16 has rows that sum to 1 within about 0.004, and may have been cast since.
TOLERANCE = 1e-2
_LARGEST = sys.float_info.max


def _typed(name: str, value: object, kind: Any, expected: str) -> None:
    # A bool is an int in Python, and never meant as one here.
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        raise TypeError(
            f"{name}: expected {expected}, got {value!r} of type {type(value).__name__}"
        )


def finite_number(name: str, value: float, *, above: float | None = None) -> float:
    """Return `value` as a float; it must be finite and >= 0, or > `above` where that is given."""
    # Comparisons alone, which NaN fails: math.isfinite would break the graph of a compiled step.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (value >= 0 if above is None else value > above) and value <= _LARGEST:
        return float(value)
    expected = f"a finite number {'>= 0' if above is None else f'> {above:g}'}"
    _typed(name, value, (int, float), expected)
    raise ValueError(f"{name}: expected {expected}, got {value!r}")


def flag(name: str, value: bool) -> bool:
    """Return `value`, which must be a bool."""
    if value is not True and value is not False:
        _typed(name, value, bool, "True or False")
    return value


def choice(name: str, value: str, options: tuple[str, ...]) -> str:
    """Return `value`, which must be one of `options`."""
    if not isinstance(value, str) or value not in options:
        _typed(name, value, str, f"one of {options}")
        raise ValueError(f"{name}: expected one of {options}, got {value!r}")
    return value


def whole_number(name: str, value: int, minimum: int) -> int:
    """Return `value`, which must be an int of at least `minimum`."""
    _typed(name, value, int, f"an int >= {minimum}")
    if value < minimum:
        raise ValueError(f"{name}: expected an int >= {minimum}, got {value}")
    return value


_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "cluster_weight": finite_number,
    "entropy_weight": finite_number,
    "temperature": partial(finite_number, above=0),
    "similarity": partial(choice, options=("cosine", "dot")),
    "positive_in_denominator": flag,
    "symmetric": flag,
    "symmetric_alignment": flag,
    "reduction": partial(choice, options=("mean", "sum")),
    "gather_distributed": flag,
    "validate_args": flag,
}


def options(**given: Any) -> dict[str, Any]:
    """Return the options of a loss as they came, each checked."""
    return {name: _OPTIONS[name](name, value) for name, value in given.items()}


def cluster_counts(num_clusters: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of clusters as a tuple; there must be one at least, each >= 2."""
    if isinstance(num_clusters, (str, bytes)) or not isinstance(num_clusters, Sequence):
        raise TypeError(
            "num_clusters: expected a sequence of ints >= 2 such as (32, 64, 128), "
            f"got {num_clusters!r} of type {type(num_clusters).__name__}"
        )
    if len(num_clusters) == 0:
        raise ValueError(
            f"num_clusters: expected one number of clusters at least, got {num_clusters!r}"
        )
    for clusters in num_clusters:
        mistyped = isinstance(clusters, bool) or not isinstance(clusters, int)
        if mistyped or clusters < 2:
            error = TypeError if mistyped else ValueError
            raise error(f"num_clusters: expected ints >= 2, got {num_clusters!r}")
    return tuple(num_clusters)


def matrix(name: str, tensor: Tensor, axes: str, *, min_columns: int = 1) -> None:
    """Check a floating-point matrix with a row at least and `min_columns` columns at least."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {axes}, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got dtype {tensor.dtype}")
    if tensor.ndim != 2:
        raise ValueError(f"{name}: expected shape {axes}, got shape {tuple(tensor.shape)}")
    rows, columns = tensor.shape
    if rows < 1 or columns < min_columns:
        letter = axes.strip("()").split(", ")[1]
        raise ValueError(
            f"{name}: expected shape {axes} with n >= 1 and {letter} >= {min_columns}, "
            f"got shape {tuple(tensor.shape)}"
        )


def pair(name: str, value: Sequence[object], form: str) -> None:
    """Check a tuple or list of two."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected a pair {form}, got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"{name}: expected a pair {form}, got {len(value)} items")


def same_shape(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    """Check that two tensors have one shape and lie on one device."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(other.shape)} as {like} has, "
            f"got shape {tuple(tensor.shape)}"
        )
    same_device(name, tensor, like, other)


def same_device(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    """Check that two tensors lie on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device} as {like} has, got device {tensor.device}"
        )


def same_rows(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    """Check that two tensors have as many rows and lie on one device."""
    if tensor.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name}: expected n = {other.shape[0]} rows as {like} has, "
            f"got shape {tuple(tensor.shape)}"
        )
    same_device(name, tensor, like, other)


def validate_finite(name: str, tensor: Tensor) -> None:
    """Check that every value is finite. Reads values: waits for a GPU."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{name}: expected finite values, got {bad} NaN or infinite ones")


def validate_assignments(name: str, tensor: Tensor) -> None:
    """Check that rows are distributions over clusters. Reads values: waits for a GPU."""
    tensor = tensor.detach()
    validate_finite(name, tensor)
    low = float(tensor.min())
    if low < 0:
        raise ValueError(f"{name}: expected values >= 0, got {low:g}")
    (tensor,) = at_least_float32(tensor)
    sums = tensor.sum(dim=1)
    off = (sums - 1).abs()
    worst = int(off.argmax())
    if float(off[worst]) > TOLERANCE:
        raise ValueError(
            f"{name}: expected rows that sum to 1 (softmax over clusters), "
            f"got {float(sums[worst]):.6g} in row {worst}"
        )


def not_logits(assignments: Mapping[str, Tensor], mass: Callable[[], Tensor] | None = None) -> None:
    """Check that assignments are not negative, where reading values waits for nothing.

    So on the CPU, in an eager step, and not for what has no values, such as fake tensors. `mass`
    is their total, if known: where it is that of rows that sum to 1, entries are not looked at.
    """
    tensors = list(assignments.values())
    if not is_eager() or not all(map(is_readable, tensors)):
        return
    rows = sum(tensor.shape[0] for tensor in tensors)
    if mass is not None and abs(float(mass()) - rows) <= TOLERANCE * rows:
        return
    for name, tensor in assignments.items():
        low = float(tensor.detach().amin(dim=0).amin())
        if low < -TOLERANCE:
            raise ValueError(
                f"{name}: expected values >= 0 as of softmax(logits, dim=1), got {low:g}; are "
                "these the logits?"
            )


def sums(name: str, total: Tensor, own: Tensor) -> None:
    """Check the sums over all micro-batches, a vector like `own`."""
    returned = "as c2bin_statistics returns"
    if not isinstance(total, Tensor):
        raise TypeError(f"{name}: expected a vector {returned}, got {type(total).__name__}")
    if total.shape != own.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(own.shape)} {returned} for the same heads and options, "
            f"got shape {tuple(total.shape)}"
        )
    if not total.is_floating_point():
        raise TypeError(f"{name}: expected floating-point sums {returned}, got {total.dtype}")
    same_device(name, total, "the batch", own)
