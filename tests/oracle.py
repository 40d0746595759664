"""The paper's equations as plain Python loops in float64.

Nothing here is shared with the library: every sum is a ``for``, every exponential is
:func:`math.exp`. A matrix is a list of rows, and the heads of a view are a sequence of matrices.
Slow, and meant to be read beside the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Matrix = list[list[float]]
Heads = Sequence[Matrix]


def rows(tensor: Tensor) -> Matrix:
    """A matrix as a list of rows of Python floats, a vector as a list of them."""
    return tensor.detach().to(torch.float64).tolist()


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine similarity; a vector of norm 0 is at cosine 0 from everything."""
    norms = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / norms if norms > 0 else 0.0


def alignment(prediction: Matrix, target: Matrix) -> float:
    """Eq. 1: one minus the cosine of a prediction with its target, mean over instances."""
    total = 0.0
    for i in range(len(prediction)):
        total += 1.0 - cosine(prediction[i], target[i])
    return total / len(prediction)


def memberships(logits: Matrix) -> Matrix:
    """Eq. 2: the softmax of every row."""
    result = []
    for row in logits:
        largest = max(row)
        weights = [math.exp(value - largest) for value in row]
        normaliser = sum(weights)
        result.append([weight / normaliser for weight in weights])
    return result


def bca(assignments: Matrix, k: int) -> list[float]:
    """Eq. 3: the batch-wise cluster assignment vector of cluster k is a column."""
    return [assignments[i][k] for i in range(len(assignments))]


def _directed_contrast(
    first: Matrix, second: Matrix, temperature: float, similarity: str, keep_positive: bool
) -> float:
    measure = {"dot": dot, "cosine": cosine}[similarity]
    clusters = len(first[0])
    total = 0.0
    for i in range(clusters):
        scores = [measure(bca(first, i), bca(second, j)) / temperature for j in range(clusters)]
        kept = [scores[j] for j in range(clusters) if keep_positive or j != i]
        largest = max(kept)
        denominator = 0.0
        for score in kept:
            denominator += math.exp(score - largest)
        total += largest + math.log(denominator) - scores[i]
    return total / clusters


def contrast(
    assignments0: Matrix,
    assignments1: Matrix,
    *,
    temperature: float = 0.5,
    similarity: str = "cosine",
    positive_in_denominator: bool = True,
    symmetric: bool = True,
) -> float:
    """Eq. 4: contrast of the columns of one view with the columns of the other."""
    options = (temperature, similarity, positive_in_denominator)
    forward = _directed_contrast(assignments0, assignments1, *options)
    if not symmetric:
        return forward
    return 0.5 * (forward + _directed_contrast(assignments1, assignments0, *options))


def mass(assignments: Matrix) -> list[float]:
    """The mass of every cluster (before Eq. 5): the sum of its column."""
    return [sum(bca(assignments, k)) for k in range(len(assignments[0]))]


def entropy_regularizer(assignments: Matrix, *, reduction: str = "mean") -> float:
    """Eq. 5: log K minus the entropy of the normalised masses; times n for ``"sum"``."""
    masses = mass(assignments)
    total = sum(masses)
    entropy = 0.0
    for value in masses:
        share = value / total
        if share > 0:
            entropy -= share * math.log(share)
    value = math.log(len(masses)) - entropy
    return {"mean": 1, "sum": len(assignments)}[reduction] * value


def multi_scale(
    assignments: tuple[Heads, Heads],
    target_assignments: tuple[Heads, Heads] | None = None,
    *,
    entropy_weight: float = 1.0,
    temperature: float = 0.1,
    reduction: str = "mean",
    **options: Any,
) -> tuple[float, float, float]:
    """Eq. 5-6: (loss, contrast summed over scales, entropy summed over scales).

    With the follower's heads, each view is contrasted with the follower's other one; the entropy
    is that of the runner's two views in either case.
    """
    pairs = [assignments]
    if target_assignments is not None:
        pairs = [
            (assignments[0], target_assignments[1]),
            (assignments[1], target_assignments[0]),
        ]
    contrasted = 0.0
    for view, other in pairs:
        for first, second in zip(view, other, strict=True):
            contrasted += contrast(first, second, temperature=temperature, **options) / len(pairs)
    spread = 0.0
    for view in assignments:
        for matrix in view:
            spread += 0.5 * entropy_regularizer(matrix, reduction=reduction)
    return contrasted + entropy_weight * spread, contrasted, spread


def total(
    predictions: Sequence[Matrix],
    targets: Sequence[Matrix],
    assignments: tuple[Heads, Heads],
    target_assignments: tuple[Heads, Heads] | None = None,
    *,
    cluster_weight: float = 0.5,
    symmetric_alignment: bool = True,
    **options: Any,
) -> tuple[float, float, float, float]:
    """Eq. 5-7: (loss, alignment, contrast summed over scales, entropy summed over scales)."""
    aligned = alignment(predictions[0], targets[1])
    if symmetric_alignment:
        aligned = 0.5 * (aligned + alignment(predictions[1], targets[0]))
    clusters, contrasted, spread = multi_scale(assignments, target_assignments, **options)
    return aligned + cluster_weight * clusters, aligned, contrasted, spread


def affine(matrix: Matrix, weight: Matrix, bias: Sequence[float] | None) -> Matrix:
    """x W^T + b, row by row."""
    offsets = [0.0] * len(weight) if bias is None else bias
    return [[dot(row, weight[j]) + offsets[j] for j in range(len(weight))] for row in matrix]


def batch_norm(matrix: Matrix, layer: dict[str, Any]) -> Matrix:
    """Every column standardised by its own mean and variance, or by the running ones."""
    result = [list(row) for row in matrix]
    for j in range(len(matrix[0])):
        column = [row[j] for row in matrix]
        mean, variance = layer["mean"][j], layer["variance"][j]
        if layer["training"]:
            mean = sum(column) / len(column)
            variance = sum((value - mean) ** 2 for value in column) / len(column)
        for i in range(len(column)):
            unit = (column[i] - mean) / math.sqrt(variance + layer["eps"])
            result[i][j] = unit * layer["scale"][j] + layer["shift"][j]
    return result


def scores(features: Matrix, head: dict[str, Any]) -> list[Matrix]:
    """Eq. 2 before the softmax: one matrix a scale.

    `head` holds `weight` and `bias` of the fused map, the numbers of `clusters`, whether to
    `normalize`, and a `hidden` layer, which may be None.
    """
    if head["normalize"]:
        d = len(features[0])
        norms = [math.sqrt(dot(row, row)) for row in features]
        features = [
            [value * math.sqrt(d) / norm if norm > 0 else 0.0 for value in row]
            for row, norm in zip(features, norms, strict=True)
        ]
    if head["hidden"] is not None:
        hidden = head["hidden"]
        features = batch_norm(affine(features, hidden["weight"], hidden["bias"]), hidden)
        features = [[max(value, 0.0) for value in row] for row in features]
    fused, parts, start = affine(features, head["weight"], head["bias"]), [], 0
    for k in head["clusters"]:
        parts.append([row[start : start + k] for row in fused])
        start += k
    return parts


def head_assignments(features: Matrix, head: dict[str, Any]) -> list[Matrix]:
    """Eq. 2-3 at every scale."""
    return [memberships(part) for part in scores(features, head)]


def objective(
    predictions: Sequence[Matrix],
    targets: Sequence[Matrix],
    features: Sequence[Matrix],
    target_features: Sequence[Matrix] | None = None,
    *,
    head: dict[str, Any],
    target_head: dict[str, Any],
    **options: Any,
) -> tuple[float, float, float, float]:
    """Eq. 2-7 from features; `target_head` is `head` as a constant, for the follower's features."""
    own = tuple(head_assignments(view, head) for view in features)
    fixed = None
    if target_features is not None:
        fixed = tuple(head_assignments(view, target_head) for view in target_features)
    return total(predictions, targets, own, fixed, **options)


def finite_differences(
    function: Callable[[], float], numbers: Any, step: float = 1e-5
) -> list[float]:
    """The gradient of a function by every number that it reads in `numbers`, in their order.

    `numbers` is lists of floats in lists and tuples; central differences are taken in place.
    """
    gradient = []
    for row, i in list(_entries(numbers)):
        original = row[i]
        row[i] = original + step
        above = function()
        row[i] = original - step
        below = function()
        row[i] = original
        gradient.append((above - below) / (2 * step))
    return gradient


def _entries(tree: Any) -> Iterator[tuple[list[float], int]]:
    for i, item in enumerate(tree):
        if isinstance(item, float):
            yield tree, i
        else:
            yield from _entries(item)
