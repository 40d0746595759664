"""Strategies for assignments, embeddings, scales, shards and dtypes.

Everything is drawn as small integers, never as floats: hypothesis then shrinks a failing matrix
entry by entry, to few rows of simple fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

Size: TypeAlias = int | tuple[int, int]
Kinds: TypeAlias = Sequence[str]

_MORE = ("softmax", "uniform", "collapsed", "constant", "dead_cluster", "near_one_hot")
ASSIGNMENT_KINDS = ("one_hot", "ratios", *_MORE)
EMBEDDING_KINDS = ("plain", "constant", "zero_row", "zero", "mixed", "huge", "tiny")
RELATIONS = ("identical", "noisy", "independent")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def size(name: str, value: Size, minimum: int) -> st.SearchStrategy[int]:
    """Return the strategy of a number of rows or columns, given as an int or inclusive range."""
    low, high = (value, value) if isinstance(value, int) else value
    if not minimum <= low <= high:
        wanted = f"an int >= {minimum} or a range (low, high) of such"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return st.integers(low, high)


def known(name: str, values: Kinds, options: Kinds) -> tuple[str, ...]:
    """Return `values` as a tuple; there must be one at least, and each must be an option."""
    if isinstance(values, str) or not values or not set(values) <= set(options):
        raise ValueError(f"{name}: expected a sequence out of {tuple(options)}, got {values!r}")
    return tuple(values)


def matrix(rows: int, columns: int, low: int, high: int) -> st.SearchStrategy[list[list[int]]]:
    """Return the strategy of the integers that everything else is made of."""
    row = st.lists(st.integers(low, high), min_size=columns, max_size=columns)
    return st.lists(row, min_size=rows, max_size=rows)


@st.composite
def assignments(
    draw: st.DrawFn,
    *,
    rows: Size = (1, 6),
    clusters: Size = (2, 5),
    kinds: Kinds = ASSIGNMENT_KINDS,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Soft cluster assignments (n, K) of one view: rows that sum to 1, Eq. 2.

    Formula: `P >= 0`, `Σ_k P[i, k] = 1`. The kinds: `one_hot`; `ratios`, small integers over their
    sum; `softmax` of integers at a sharpness between 0.25 and 50; `uniform`; `collapsed`, one
    cluster holds everything; `constant`, all rows alike; `dead_cluster`, one cluster holds
    nothing; `near_one_hot`, down to 1e-8 off.

    Args:
        rows: n, an int or an inclusive range.
        clusters: K >= 2, an int or an inclusive range.
        kinds: some of `ASSIGNMENT_KINDS`.
        dtype: of the result.

    Returns:
        A strategy of tensors (n, K).

    Raises:
        ValueError: an empty range, K < 2 or an unknown kind.

    Source: C2BIN, section 3.3.

    Examples:
        >>> from hypothesis import find
        >>> find(assignments(), lambda view: view.max() < 1)
        tensor([[0.5000, 0.5000]])
    """
    n, k = draw(size("rows", rows, 1)), draw(size("clusters", clusters, 2))
    return _assignments(draw, n, k, known("kinds", kinds, ASSIGNMENT_KINDS)).to(dtype)


@st.composite
def paired_assignments(
    draw: st.DrawFn,
    *,
    rows: Size = (1, 6),
    clusters: Size = (2, 5),
    kinds: Kinds = ASSIGNMENT_KINDS,
    relations: Kinds = RELATIONS,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Assignments of two views of the same instances, each (n, K).

    Formula: `P''` is `P'`, `(1 - t) P' + t Q` with t of 1/2, 1/8 or 1/64, or `Q`, for a `Q` drawn
    like `P'`: the relations `identical`, `noisy` and `independent`.

    Args:
        rows: as of `assignments`, like clusters, kinds and dtype.
        relations: some of the three.

    Returns:
        A strategy of pairs of tensors (n, K) that share no memory.

    Raises:
        ValueError: an empty range, K < 2, an unknown kind or relation.

    Source: C2BIN, section 3.3.

    Examples:
        >>> strategy = paired_assignments(relations=["identical"])
    """
    n, k = draw(size("rows", rows, 1)), draw(size("clusters", clusters, 2))
    kinds = known("kinds", kinds, ASSIGNMENT_KINDS)
    relation = draw(st.sampled_from(known("relations", relations, RELATIONS)))
    first = _assignments(draw, n, k, kinds)
    if relation == "identical":
        return first.to(dtype), first.clone().to(dtype)
    second = _assignments(draw, n, k, kinds)
    if relation == "noisy":
        second = first.lerp(second, draw(st.sampled_from((1 / 2, 1 / 8, 1 / 64))))
    return first.to(dtype), second.to(dtype)


@st.composite
def embeddings(
    draw: st.DrawFn,
    *,
    rows: Size = (1, 6),
    features: Size = (1, 5),
    kinds: Kinds = EMBEDDING_KINDS,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Embeddings (n, d) of one view, such as projector or predictor outputs.

    Formula: small integers times a scale. The kinds: `plain`, no row is zero; `constant`, all rows
    alike; `zero_row`, one row is zero; `zero`, all are; `mixed`, a scale for each row; `huge` and
    `tiny`, 1e30 and 1e-30, or 2¹² and 2⁻¹⁴ for float16, whose range is that narrow.

    Args:
        rows: n, an int or an inclusive range.
        features: d, an int or an inclusive range.
        kinds: some of `EMBEDDING_KINDS`.
        dtype: of the result.

    Returns:
        A strategy of finite tensors (n, d).

    Raises:
        ValueError: an empty range or an unknown kind.

    Source: the inputs of C2BIN's Eq. 1.

    Examples:
        >>> from hypothesis import find
        >>> find(embeddings(rows=1, kinds=["plain"]), lambda view: view.max() > 2)
        tensor([[3.]])
    """
    n, d = draw(size("rows", rows, 1)), draw(size("features", features, 1))
    return _embeddings(draw, n, d, known("kinds", kinds, EMBEDDING_KINDS), dtype)


@st.composite
def paired_embeddings(
    draw: st.DrawFn,
    *,
    rows: Size = (1, 6),
    features: Size = (1, 5),
    kinds: Kinds = EMBEDDING_KINDS,
    relations: Kinds = ("identical", "opposite", *RELATIONS[1:]),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """A prediction and its target, each (n, d).

    Formula: `z` is `p`, `-p`, `p + q/8` or `q`, for a `q` drawn like `p`: the relations
    `identical`, `opposite`, `noisy` and `independent`.

    Args:
        rows: as of `embeddings`, like features, kinds and dtype.
        relations: some of the four.

    Returns:
        A strategy of pairs of tensors (n, d) that share no memory.

    Raises:
        ValueError: an empty range, an unknown kind or relation.

    Source: the inputs of C2BIN's Eq. 1.

    Examples:
        >>> strategy = paired_embeddings(rows=1, features=(2, 8))
    """
    n, d = draw(size("rows", rows, 1)), draw(size("features", features, 1))
    kinds = known("kinds", kinds, EMBEDDING_KINDS)
    relation = draw(st.sampled_from(known("relations", relations, ("opposite", *RELATIONS))))
    first = _embeddings(draw, n, d, kinds, dtype)
    if relation in ("identical", "opposite"):
        return first, first.clone() if relation == "identical" else -first
    second = _embeddings(draw, n, d, kinds, dtype)
    # Entries of a plain row are integers up to 4: an eighth of another one cannot cancel them.
    return first, first + second / 8 if relation == "noisy" else second


def scales(
    *, min_scales: int = 1, max_scales: int = 3, clusters: Size = (2, 8)
) -> st.SearchStrategy[tuple[int, ...]]:
    """Numbers of clusters of several heads, Eq. 6.

    Formula: `(K_1, ..., K_m)` with `K >= 2`, in any order, equal ones included.

    Args:
        min_scales: least number of heads; max_scales is the largest.
        clusters: each K, an int or an inclusive range.

    Returns:
        A strategy of tuples of ints.

    Raises:
        ValueError: K < 2 or an empty range.

    Source: C2BIN, section 3.4.

    Examples:
        >>> from hypothesis import find
        >>> find(scales(), lambda found: len(found) == 2)
        (2, 2)
    """
    numbers = size("clusters", clusters, 2)
    return st.lists(numbers, min_size=min_scales, max_size=max_scales).map(tuple)


@st.composite
def shards(draw: st.DrawFn, rows: Size = (1, 12), *, max_shards: int = 4) -> tuple[int, ...]:
    """Sizes of the parts, none empty and seldom equal, of a batch that several ranks share.

    Formula: `n_r >= 1`, `Σ_r n_r = n`; `tensor.split(sizes)` gives the parts.

    Args:
        rows: n, an int or an inclusive range.
        max_shards: largest number of parts; there are never more than n.

    Returns:
        A strategy of tuples of ints.

    Raises:
        ValueError: an empty range.

    Source: the shards of C2BIN's global batch; `c2bin_ext.distributed`.

    Examples:
        >>> from hypothesis import find
        >>> find(shards(5), lambda sizes: len(sizes) == 2)
        (1, 4)
    """
    left, sizes = draw(size("rows", rows, 1)), list[int]()
    for after in range(draw(st.integers(1, min(left, max_shards))) - 1, 0, -1):
        sizes.append(draw(st.integers(1, left - after)))
        left -= sizes[-1]
    return (*sizes, left)


def dtypes(*, only: Sequence[torch.dtype] = DTYPES) -> st.SearchStrategy[torch.dtype]:
    """Floating-point dtypes that training uses.

    Args:
        only: the dtypes to draw from; the first is the simplest.

    Returns:
        A strategy of dtypes.

    Raises:
        ValueError: no dtype.

    Source: `c2bin_ext` serves these four.

    Examples:
        >>> from hypothesis import find
        >>> find(dtypes(), lambda dtype: dtype.itemsize < 4)
        torch.float16
    """
    if not only:
        raise ValueError("only: expected one dtype at least, got none")
    return st.sampled_from(tuple(only))


def _nonzero(matrix: list[list[int]]) -> Tensor:
    # All zeros is what hypothesis shrinks to. Reading it as a unit vector keeps every draw valid.
    fixed = [row if any(row) else [1, *row[1:]] for row in matrix]
    return torch.tensor(fixed, dtype=torch.float64)


def _one_hot(labels: list[int], clusters: int) -> Tensor:
    return torch.eye(clusters, dtype=torch.float64)[labels]


def _assignments(draw: st.DrawFn, n: int, k: int, kinds: tuple[str, ...]) -> Tensor:
    kind = draw(st.sampled_from(kinds))
    label = st.integers(0, k - 1)
    if kind == "uniform":
        return torch.full((n, k), 1 / k, dtype=torch.float64)
    if kind == "collapsed":
        return _one_hot([draw(label)] * n, k)
    if kind in ("one_hot", "near_one_hot"):
        hard = _one_hot(draw(st.lists(label, min_size=n, max_size=n)), k)
        if kind == "one_hot":
            return hard
        epsilon = draw(st.sampled_from((1e-2, 1e-4, 1e-8)))
        return hard * (1 - k * epsilon) + epsilon
    if kind == "softmax":
        logits = torch.tensor(draw(matrix(n, k, -3, 3)), dtype=torch.float64)
        return (logits * draw(st.sampled_from((1.0, 0.25, 5.0, 50.0)))).softmax(dim=1)
    weights = draw(matrix(1 if kind == "constant" else n, k, 0, 4))
    if kind == "dead_cluster":
        dead = draw(label)
        for row in weights:
            row[dead] = 0
            if not any(row):
                row[(dead + 1) % k] = 1
    ratios = _nonzero(weights)
    ratios = ratios / ratios.sum(dim=1, keepdim=True)
    return ratios.expand(n, k).clone() if kind == "constant" else ratios


def _embeddings(
    draw: st.DrawFn, n: int, d: int, kinds: tuple[str, ...], dtype: torch.dtype
) -> Tensor:
    kind = draw(st.sampled_from(kinds))
    if kind == "zero":
        return torch.zeros(n, d, dtype=dtype)
    values = _nonzero(draw(matrix(1 if kind == "constant" else n, d, -4, 4))).expand(n, d).clone()
    huge, tiny = (2.0**12, 2.0**-14) if dtype is torch.float16 else (1e30, 1e-30)
    if kind == "zero_row":
        values[draw(st.integers(0, n - 1))] = 0
    elif kind == "mixed":
        factor = st.sampled_from((1.0, huge, tiny))
        factors = draw(st.lists(factor, min_size=n, max_size=n))
        values *= torch.tensor(factors, dtype=torch.float64)[:, None]
    elif kind in ("huge", "tiny"):
        values *= huge if kind == "huge" else tiny
    return values.to(dtype)
