"""Strategies, all made of small integers, which hypothesis shrinks to simple fractions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

T = TypeVar("T")
Size: TypeAlias = int | tuple[int, int]
Sizes: TypeAlias = st.SearchStrategy[tuple[int, ...]]
Kinds: TypeAlias = Sequence[str]

_DEGENERATE = ("uniform", "collapsed", "constant", "dead_cluster", "near_one_hot")
ASSIGNMENT_KINDS = ("one_hot", "ratios", "softmax", *_DEGENERATE)
EMBEDDING_KINDS = ("plain", "constant", "zero_row", "zero", "mixed", "huge", "tiny")
RELATIONS = ("identical", "noisy", "independent")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def size(name: str, value: Size, minimum: int) -> st.SearchStrategy[int]:
    """Return the strategy of a number of rows or columns."""
    low, high = (value, value) if isinstance(value, int) else value
    if not minimum <= low <= high:
        raise ValueError(f"{name}: expected an int or range >= {minimum}, got {value!r}")
    return st.integers(low, high)


def known(name: str, values: Sequence[T], options: Sequence[T]) -> tuple[T, ...]:
    """Return `values`, of which there must be one at least, and each must be an option."""
    if not values or not set(values) <= set(options):
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

    Formula: `P >= 0`, `Σ_k P[i, k] = 1`; `ratios` are small integers over their sum, `softmax` is
    of integers times 0.25 to 50, `near_one_hot` is down to 1e-8 off. Source: C2BIN, section 3.3.

    Args:
        rows: n, an int or an inclusive range; `clusters` is K >= 2, likewise.
        kinds: some of `ASSIGNMENT_KINDS`.
        dtype: of the result.

    Returns:
        A strategy of tensors (n, K).

    Raises:
        ValueError: an empty range, K < 2 or an unknown kind.

    Examples:
        >>> from hypothesis import find
        >>> find(assignments(), lambda view: view.max() < 1)
        tensor([[0.5000, 0.5000]])
    """
    n, k = draw(size("rows", rows, 1)), draw(size("clusters", clusters, 2))
    kind = draw(st.sampled_from(known("kinds", kinds, ASSIGNMENT_KINDS)))
    label = st.integers(0, k - 1)
    if kind == "uniform":
        return torch.full((n, k), 1 / k, dtype=dtype)
    if kind in ("one_hot", "near_one_hot", "collapsed"):
        shared = kind == "collapsed"
        labels = [draw(label)] * n if shared else draw(st.lists(label, min_size=n, max_size=n))
        off = draw(st.sampled_from((1e-2, 1e-4, 1e-8))) if kind == "near_one_hot" else 0.0
        return (torch.eye(k, dtype=torch.float64)[labels] * (1 - k * off) + off).to(dtype)
    if kind == "softmax":
        logits = torch.tensor(draw(matrix(n, k, -3, 3)), dtype=torch.float64)
        return (logits * draw(st.sampled_from((1.0, 0.25, 5.0, 50.0)))).softmax(dim=1).to(dtype)
    weights = draw(matrix(1 if kind == "constant" else n, k, 0, 4))
    if kind == "dead_cluster":
        dead = draw(label)
        for row in weights:
            row[dead] = 0
            row[(dead + 1) % k] += not any(row)
    ratios = _nonzero(weights)
    return (ratios / ratios.sum(dim=1, keepdim=True)).expand(n, k).to(dtype, copy=True)


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

    Formula: `P''` is `P'` (identical), `(1 - t) P' + t Q` with t of 1/2, 1/8 or 1/64 (noisy), or
    `Q` (independent), for a `Q` drawn like `P'`. Source: C2BIN, section 3.3.

    Args:
        rows: as of `assignments`, like clusters, kinds and dtype.
        relations: some of the three.

    Returns:
        A strategy of pairs of tensors (n, K) that share no memory.

    Raises:
        ValueError: an empty range, K < 2, an unknown kind or relation.

    Examples:
        >>> strategy = paired_assignments(relations=["identical"])
    """
    n, k = draw(size("rows", rows, 1)), draw(size("clusters", clusters, 2))
    view = assignments(rows=n, clusters=k, kinds=kinds, dtype=torch.float64)
    relation = draw(st.sampled_from(known("relations", relations, RELATIONS)))
    first = draw(view)
    second = first.clone() if relation == "identical" else draw(view)
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

    Formula: small integers times a scale: 1; 1e±30 (`huge`, `tiny`), which is 2¹² and 2⁻¹⁴ in
    float16; or one for each row (`mixed`). Source: the inputs of C2BIN's Eq. 1.

    Args:
        rows: n, an int or an inclusive range; `features` is d, likewise.
        kinds: some of `EMBEDDING_KINDS`.
        dtype: of the result.

    Returns:
        A strategy of finite tensors (n, d).

    Raises:
        ValueError: an empty range or an unknown kind.

    Examples:
        >>> from hypothesis import find
        >>> find(embeddings(rows=1, kinds=["plain"]), lambda view: view.max() > 2)
        tensor([[3.]])
    """
    n, d = draw(size("rows", rows, 1)), draw(size("features", features, 1))
    kind = draw(st.sampled_from(known("kinds", kinds, EMBEDDING_KINDS)))
    if kind == "zero":
        return torch.zeros(n, d, dtype=dtype)
    values = _nonzero(draw(matrix(1 if kind == "constant" else n, d, -4, 4))).expand(n, d).clone()
    huge, tiny = (2.0**12, 2.0**-14) if dtype is torch.float16 else (1e30, 1e-30)
    if kind == "zero_row":
        values[draw(st.integers(0, n - 1))] = 0
    elif kind == "mixed":
        factors = draw(st.lists(st.sampled_from((1.0, huge, tiny)), min_size=n, max_size=n))
        values *= torch.tensor(factors, dtype=torch.float64)[:, None]
    return (values * {"huge": huge, "tiny": tiny}.get(kind, 1.0)).to(dtype)


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

    Formula: `z` is `p` (identical), `-p` (opposite), `p + q/8` (noisy) or `q` (independent), for a
    `q` drawn like `p`. Source: the inputs of C2BIN's Eq. 1.

    Args:
        rows: as of `embeddings`, like features, kinds and dtype.
        relations: some of the four.

    Returns:
        A strategy of pairs of tensors (n, d) that share no memory.

    Raises:
        ValueError: an empty range, an unknown kind or relation.

    Examples:
        >>> strategy = paired_embeddings(rows=1, features=(2, 8))
    """
    n, d = draw(size("rows", rows, 1)), draw(size("features", features, 1))
    view = embeddings(rows=n, features=d, kinds=kinds, dtype=dtype)
    relation = draw(st.sampled_from(known("relations", relations, ("opposite", *RELATIONS))))
    first = draw(view)
    if relation in ("identical", "opposite"):
        return first, first.clone() if relation == "identical" else -first
    # Entries of a plain row are integers up to 4: an eighth of another one cannot cancel them.
    return first, first + draw(view) / 8 if relation == "noisy" else draw(view)


def scales(*, min_scales: int = 1, max_scales: int = 3, clusters: Size = (2, 8)) -> Sizes:
    """Numbers of clusters of several heads, Eq. 6.

    Formula: `(K_1, ..., K_m)` with `K >= 2`, in any order, equal ones included. Source: Eq. 6.

    Args:
        min_scales: least number of heads; max_scales is the largest.
        clusters: each K, an int or an inclusive range.

    Returns:
        A strategy of tuples of ints.

    Raises:
        ValueError: K < 2 or an empty range.

    Examples:
        >>> strategy = scales(max_scales=2, clusters=(32, 128))
    """
    numbers = size("clusters", clusters, 2)
    return st.lists(numbers, min_size=min_scales, max_size=max_scales).map(tuple)


@st.composite
def shards(draw: st.DrawFn, rows: Size = (1, 12), *, max_shards: int = 4) -> tuple[int, ...]:
    """Sizes of the parts, none empty and seldom equal, of a batch that several ranks share.

    Formula: `n_r >= 1`, `Σ_r n_r = n`, for `tensor.split`. Source: `c2bin_ext.distributed`.

    Args:
        rows: n, an int or an inclusive range; max_shards is the largest number of parts.

    Returns:
        A strategy of tuples of ints.

    Raises:
        ValueError: an empty range.

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
    """Floating-point dtypes that training uses. Source: those that `c2bin_ext` serves.

    Args:
        only: the dtypes to draw from; the first is the simplest.

    Returns:
        A strategy of dtypes.

    Raises:
        ValueError: no dtype, or another one.

    Examples:
        >>> strategy = dtypes(only=[torch.float32, torch.float64])
    """
    return st.sampled_from(known("only", only, DTYPES))


def _nonzero(matrix: list[list[int]]) -> Tensor:
    # All zeros is what hypothesis shrinks to. Reading it as a unit vector keeps every draw valid.
    fixed = [row if any(row) else [1, *row[1:]] for row in matrix]
    return torch.tensor(fixed, dtype=torch.float64)
