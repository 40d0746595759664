"""The paper's equations as plain Python loops in float64, and random inputs to feed them.

Nothing here is shared with the library: every sum is a ``for``, every exponential is
:func:`math.exp`. A matrix is a list of rows. Slow, and meant to be read beside the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Matrix = list[list[float]]


def rows(tensor: Tensor) -> Matrix:
    """A 2-D tensor as a list of rows of Python floats."""
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


def total(
    predictions: Sequence[Matrix],
    targets: Sequence[Matrix],
    assignments: Sequence[Sequence[Matrix]],
    *,
    cluster_weight: float = 2.0,
    entropy_weight: float = 1.0,
    temperature: float = 0.5,
    similarity: str = "cosine",
    positive_in_denominator: bool = True,
    symmetric: bool = True,
    symmetric_alignment: bool = True,
    reduction: str = "mean",
) -> tuple[float, float, float, float]:
    """Eq. 5-7: (loss, alignment, contrast summed over scales, entropy summed over scales)."""
    aligned = alignment(predictions[0], targets[1])
    if symmetric_alignment:
        aligned = 0.5 * (aligned + alignment(predictions[1], targets[0]))
    contrasted, spread = 0.0, 0.0
    for first, second in zip(*assignments, strict=True):
        contrasted += contrast(
            first,
            second,
            temperature=temperature,
            similarity=similarity,
            positive_in_denominator=positive_in_denominator,
            symmetric=symmetric,
        )
        for view in (first, second):
            spread += 0.5 * entropy_regularizer(view, reduction=reduction)
    loss = aligned + cluster_weight * (contrasted + entropy_weight * spread)
    return loss, aligned, contrasted, spread


def finite_differences(
    function: Callable[[Matrix], float], matrix: Matrix, step: float = 1e-5
) -> Matrix:
    """The gradient of a function of one matrix, by central differences."""
    gradient = [[0.0] * len(row) for row in matrix]
    for i in range(len(matrix)):
        for j in range(len(matrix[i])):
            original = matrix[i][j]
            matrix[i][j] = original + step
            above = function(matrix)
            matrix[i][j] = original - step
            below = function(matrix)
            matrix[i][j] = original
            gradient[i][j] = (above - below) / (2 * step)
    return gradient


# Inputs ------------------------------------------------------------------------------------


def random_embeddings(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian embeddings (n, d)."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_assignments(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Softmax rows (n, K), away from both uniform and one-hot."""
    return random_embeddings(n, k, seed).softmax(dim=1).to(dtype)


def one_hot(n: int, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Instance i in cluster i mod K: balanced when K divides n, dead clusters when K > n."""
    return torch.eye(k, dtype=dtype)[torch.arange(n) % k]


def uniform(n: int, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Every instance spread evenly over the clusters."""
    return torch.full((n, k), 1 / k, dtype=dtype)


def collapsed(n: int, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Every instance in cluster 0."""
    return torch.eye(k, dtype=dtype)[torch.zeros(n, dtype=torch.long)]


def dead_cluster(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Softmax rows over all clusters but the last, which nobody chooses."""
    alive = random_assignments(n, k - 1, seed, dtype)
    return torch.cat([alive, alive.new_zeros(n, 1)], dim=1)
