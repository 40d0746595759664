"""The strategies draw what they say, all of it, and shrink to what a person can read."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import product
from operator import is_
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import Tensor

from c2bin_ext import testing
from c2bin_ext.testing._search import show

T = TypeVar("T")
FIND = settings(
    database=None,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    max_examples=400,
)
N, K, D = 3, 3, 2
SHARES = {Fraction(1, 2), Fraction(1, 8), Fraction(1, 64)}


def drawn(strategy: st.SearchStrategy[T], count: int = 150) -> list[T]:
    """Return `count` draws, always the same."""
    found: list[T] = []

    @settings(FIND, max_examples=count, phases=[Phase.generate])
    @given(strategy)
    def collect(value: T) -> None:
        found.append(value)

    collect()
    return found


def assignments(kind: str) -> list[Tensor]:
    return drawn(testing.assignments(rows=N, clusters=K, kinds=[kind], dtype=torch.float64))


def embeddings(kind: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    views = drawn(testing.embeddings(rows=N, features=D, kinds=[kind], dtype=dtype))
    assert all(view.shape == (N, D) and view.dtype is dtype for view in views)
    return views


def holders(views: list[Tensor], condition: Callable[[Tensor], Any]) -> int:
    return sum(condition(view) for view in views)


@settings(FIND, max_examples=60)
@given(testing.dtypes().flatmap(lambda dtype: testing.assignments(dtype=dtype)))
def test_assignments_are_assignments(view: Tensor) -> None:
    assert view.ndim == 2
    assert 1 <= view.shape[0] <= 6
    assert 2 <= view.shape[1] <= 5
    assert (view >= 0).all()
    slack = 8 * torch.finfo(view.dtype).eps
    assert ((view.double().sum(dim=1) - 1).abs() <= slack).all()


CONDITIONS: dict[str, Callable[[Tensor], Any]] = {
    "n = 1": lambda view: len(view) == 1,
    "n > K": lambda view: view.shape[0] > view.shape[1],
    "K > n": lambda view: view.shape[1] > view.shape[0],
    "one-hot": lambda view: view.amax(dim=1).eq(1).all().item() and view.sum(0).gt(0).all().item(),
    "uniform": lambda view: view.std(dim=1).max().item() < 1e-9 and len(view) > 1,
    "collapsed": lambda view: view[:, -1].eq(1).all().item() and len(view) > 1,
    "dead cluster": lambda view: view[:, 0].eq(0).all().item() and 0.1 < view.max() < 0.9,
    "near one-hot": lambda view: 0 < (1 - view.max()).item() < 1e-6,
    "soft": lambda view: 0.3 < view.max() < 0.9 and view.unique().numel() > 3,
    "constant": lambda view: len(view) > 1 and view.std(0).max() == 0 and view.std() > 0.1,
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_assignments_hold_the_extremes(name: str) -> None:
    found = find(testing.assignments(dtype=torch.float64), CONDITIONS[name], settings=FIND)
    assert found.numel() <= 15


def test_assignments_shrink_to_simple_fractions() -> None:
    found = find(
        testing.assignments(),
        lambda view: len(view) > 1 and 0.3 < view[1, 0] < 0.9,
        settings=FIND,
    )
    assert show(found) == "torch.tensor([[1/2, 1/2], [1/2, 1/2]])"
    views = find(
        testing.paired_assignments(), lambda pair: not pair[0].equal(pair[1]), settings=FIND
    )
    assert [tuple(view.shape) for view in views] == [(1, 2), (1, 2)]


def test_paired_assignments_hold_all_relations() -> None:
    strategy = testing.paired_assignments(dtype=torch.float64)
    same = find(strategy, lambda pair: pair[0].equal(pair[1]) and len(pair[0]) > 1, settings=FIND)
    assert same[0].data_ptr() != same[1].data_ptr()
    find(strategy, lambda pair: 0 < (pair[0] - pair[1]).abs().max() < 0.1, settings=FIND)
    find(strategy, lambda pair: (pair[0] - pair[1]).abs().max() == 1, settings=FIND)


@settings(FIND, max_examples=60)
@given(testing.dtypes().flatmap(lambda dtype: testing.paired_embeddings(dtype=dtype)))
def test_embeddings_are_finite(pair: tuple[Tensor, Tensor]) -> None:
    assert pair[0].shape == pair[1].shape
    assert pair[0].dtype == pair[1].dtype
    assert all(torch.isfinite(view).all() for view in pair)


@pytest.mark.parametrize(
    ("dtype", "huge", "tiny"), [(torch.float32, 1e29, 1e-29), (torch.float16, 4e3, 3e-4)]
)
def test_embeddings_hold_the_extremes(dtype: torch.dtype, huge: float, tiny: float) -> None:
    strategy = testing.embeddings(dtype=dtype)
    find(strategy, lambda x: not x.any(), settings=FIND)
    find(strategy, lambda x: x.any() and not x.any(dim=1).all(), settings=FIND)
    find(strategy, lambda x: x.abs().max() > huge, settings=FIND)
    find(strategy, lambda x: 0 < x.abs().max() < tiny, settings=FIND)


def test_paired_embeddings_hold_opposites() -> None:
    find(testing.paired_embeddings(), lambda p: p[0].any() and p[0].equal(-p[1]), settings=FIND)


@settings(FIND, max_examples=60)
@given(testing.shards(), testing.scales())
def test_shards_and_scales(sizes: tuple[int, ...], numbers: tuple[int, ...]) -> None:
    assert 1 <= len(sizes) <= 4
    assert min(sizes) >= 1
    assert 1 <= sum(sizes) <= 12
    assert torch.cat(torch.zeros(sum(sizes)).split(list(sizes))).numel() == sum(sizes)
    assert 1 <= len(numbers) <= 3
    assert min(numbers) >= 2


def test_shards_are_uneven() -> None:
    found = find(testing.shards(), lambda s: len(s) > 2 and len(set(s)) == len(s), settings=FIND)
    assert sorted(found) == [1, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: testing.assignments(clusters=1), "clusters: expected an int or range >= 2"),
        (lambda: testing.assignments(rows=(3, 2)), "rows: expected an int or range >= 1"),
        (lambda: testing.assignments(kinds=["soft"]), "kinds: expected a sequence out of"),
        (lambda: testing.assignments(kinds="uniform"), "kinds: expected a sequence out of"),
        (lambda: testing.embeddings(features=0), "features: expected an int or range >= 1"),
        (lambda: testing.paired_embeddings(relations=[]), "relations: expected a sequence"),
        (lambda: testing.paired_assignments(relations=["same"]), "relations: expected a sequence"),
        (lambda: testing.embeddings(rows=0), "rows: expected an int or range >= 1"),
        (lambda: testing.embeddings(kinds=["soft"]), "kinds: expected a sequence out of"),
        (lambda: testing.paired_embeddings(rows=0), "rows: expected an int or range >= 1"),
        (lambda: testing.paired_embeddings(features=0), "features: expected an int or range >= 1"),
        (lambda: testing.paired_assignments(clusters=1), "clusters: expected an int or range >= 2"),
        (lambda: testing.scales(clusters=1), "clusters: expected"),
        (lambda: testing.shards(rows=0), "rows: expected an int or range >= 1"),
        (lambda: testing.paired_assignments(rows=0), "rows: expected an int or range >= 1"),
        (lambda: testing.dtypes(only=[]), "only: expected a sequence"),
    ],
)
def test_wrong_arguments_of_strategies(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        find(make(), lambda _: True, settings=FIND)


def test_strategies_print_what_they_were_made_with() -> None:
    assert repr(testing.assignments(rows=3)) == "assignments(rows=3)"


@pytest.mark.parametrize("clusters", [2, 8])
@pytest.mark.parametrize("count", [1, 3])
def test_scales(clusters: int, count: int) -> None:
    found = find(testing.scales(), lambda s: s == (clusters,) * count, settings=FIND)
    assert isinstance(found, tuple)
    with pytest.raises(NoSuchExample):
        find(testing.scales(), lambda s: not s or len(s) > 3 or max(s) > 8, settings=FIND)
    own = testing.scales(min_scales=2, max_scales=2, clusters=5)
    assert find(own, lambda _: True, settings=FIND) == (5, 5)
    with pytest.raises(NoSuchExample):
        find(own, lambda s: s != (5, 5), settings=FIND)


def test_dtypes_drawn() -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        find(testing.dtypes(), partial(is_, dtype), settings=FIND)
    only = testing.dtypes(only=[torch.float64])
    with pytest.raises(NoSuchExample):
        find(only, lambda found: found is not torch.float64, settings=FIND)


# --- every kind by itself -------------------------------------------------------------------------


def test_uniform_assignments() -> None:
    assert all((view == 1 / K).all() for view in assignments("uniform"))


def test_collapsed_assignments() -> None:
    views = assignments("collapsed")
    assert all(view.sum(0).max() == N for view in views)
    assert {int(view.sum(0).argmax()) for view in views} == set(range(K))


def test_one_hot_assignments() -> None:
    views = assignments("one_hot")
    assert all(view.eq(1).sum(1).eq(1).all() and view.eq(0).sum() == N * (K - 1) for view in views)
    assert {tuple(view.argmax(1).tolist()) for view in views} == set(product(range(K), repeat=N))


def test_nearly_one_hot_assignments() -> None:
    views = assignments("near_one_hot")
    small = {1e-2, 1e-4, 1e-8}
    assert {view.min().item() for view in views} == small
    for view in views:
        epsilon = view.min().item()
        labels = view.argmax(1)
        wanted = torch.full((N, K), epsilon, dtype=torch.float64)
        wanted[range(N), labels] = 1 - (K - 1) * epsilon
        torch.testing.assert_close(view, wanted, rtol=0, atol=1e-15)


def test_softmax_assignments() -> None:
    steps = {1.0: set(), 0.25: set(), 5.0: set(), 50.0: set()}  # type: dict[float, set[float]]
    for view in assignments("softmax"):
        ratios = view.log()[:, :, None] - view.log()[:, None]
        # The sharpness: what all differences of logits are whole multiples of.
        fits = [s for s in steps if torch.allclose(ratios / s, (ratios / s).round(), atol=1e-9)]
        assert fits
        steps[max(fits)].add(ratios.max().item() / max(fits))
    assert all(1 <= round(max(seen)) <= 6 for seen in steps.values())
    assert {round(max(seen)) for seen in steps.values()} == {6}


ROWS_OF_RATIOS = {
    tuple(Fraction(w, sum(weights)) for w in weights)
    for weights in product(range(5), repeat=K)
    if any(weights)
}


def fractions(row: Tensor) -> tuple[Fraction, ...]:
    return tuple(Fraction(value).limit_denominator(12) for value in row.tolist())


def test_ratios() -> None:
    views = assignments("ratios")
    rows = {fractions(row) for view in views for row in view}
    assert rows <= ROWS_OF_RATIOS
    assert holders(views, lambda view: view.eq(0).any().item())
    fourths = {(Fraction(4, s), Fraction(s - 4, s)) for s in (5, 7)}
    assert any(Fraction(0) not in row for row in rows)
    assert any(sorted(row)[1:] == sorted(pair) for row in rows for pair in fourths)
    # All zeros, what weights shrink to, is read as a unit vector.
    simplest = testing.assignments(rows=1, clusters=3, kinds=["ratios"])
    assert find(simplest, lambda _: True, settings=FIND).tolist() == [[1, 0, 0]]


def test_constant_assignments() -> None:
    views = assignments("constant")
    assert all(view.eq(view[0]).all() for view in views)
    assert {fractions(view[0]) for view in views} <= ROWS_OF_RATIOS
    views[0][0] += 1  # rows that shared memory would all change
    assert not views[0].eq(views[0][0]).all()


def test_assignments_with_a_dead_cluster() -> None:
    views = assignments("dead_cluster")
    assert all(view.sum(0).min() == 0 for view in views)
    assert all(((view.sum(1) - 1).abs() < 1e-12).all() for view in views)
    alone = [view for view in views if view.sum(0).eq(0).sum() == 1]
    assert {int(view.sum(0).argmin()) for view in alone} == set(range(K))
    rows = {fractions(row) for view in views for row in view}
    assert rows <= ROWS_OF_RATIOS
    assert len(rows) > 10
    # Rows left without weight go to the cluster after the dead one.
    simplest = testing.assignments(rows=1, clusters=3, kinds=["dead_cluster"])
    assert find(simplest, lambda _: True, settings=FIND).tolist() == [[0, 1, 0]]
    last = find(simplest, lambda view: view[0, 0] == 1 and view[0, 1] == 0, settings=FIND)
    assert last.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("kind", ["uniform", "one_hot", "softmax"])
def test_dtype_of_assignments(kind: str) -> None:
    for dtype in (torch.float32, torch.float16):
        strategy = testing.assignments(kinds=[kind], dtype=dtype)
        pairs = testing.paired_assignments(kinds=[kind], dtype=dtype)
        assert all(view.dtype is dtype for view in drawn(strategy, 20))
        assert all(view.dtype is dtype for pair in drawn(pairs, 20) for view in pair)
    assert drawn(testing.assignments(), 1)[0].dtype is torch.float32
    assert drawn(testing.embeddings(), 1)[0].dtype is torch.float32
    for pairs in (testing.paired_assignments(), testing.paired_embeddings()):
        assert all(view.dtype is torch.float32 for view in drawn(pairs, 1)[0])


def test_plain_embeddings() -> None:
    views = embeddings("plain")
    assert all(view.any(1).all() for view in views)
    entries = {value for view in views for value in view.flatten().tolist()}
    assert entries == set(range(-4, 5))
    assert holders(views, lambda view: not view.eq(view[0]).all().item()) > len(views) / 2


def test_constant_embeddings() -> None:
    views = embeddings("constant")
    assert all(view.eq(view[0]).all() and view.any() for view in views)
    assert {value for view in views for value in view.flatten().tolist()} == set(range(-4, 5))
    views[0][0] += 1
    assert not views[0].eq(views[0][0]).all()


def test_embeddings_with_a_zero_row() -> None:
    views = embeddings("zero_row")
    assert all(view.any(1).sum() == N - 1 for view in views)
    assert {int(view.any(1).int().argmin()) for view in views} == set(range(N))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_zero_embeddings(dtype: torch.dtype) -> None:
    assert all(not view.any() for view in embeddings("zero", dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_scaled_embeddings(dtype: torch.dtype) -> None:
    huge, tiny = (4096.0, 2.0**-14) if dtype is torch.float16 else (1e30, 1e-30)

    def scales(view: Tensor) -> list[float]:
        """Of each row: what makes its entries small whole numbers again."""
        found = []
        for row in view.double():
            fits = [s for s in (1.0, huge, tiny) if 1 <= round((row / s).abs().max().item()) <= 4]
            assert len(fits) == 1
            whole = row / fits[0]
            assert torch.allclose(whole, whole.round(), rtol=1e-6)
            found.append(fits[0])
        return found

    assert {s for view in embeddings("huge", dtype) for s in scales(view)} == {huge}
    assert {s for view in embeddings("tiny", dtype) for s in scales(view)} == {tiny}
    mixed = [scales(view) for view in embeddings("mixed", dtype)]
    assert {s for view in mixed for s in view} == {1.0, huge, tiny}
    assert any(len(set(view)) == 3 for view in mixed)


# --- two views ------------------------------------------------------------------------------------


def pairs_of_assignments(relation: str) -> list[tuple[Tensor, Tensor]]:
    return drawn(
        testing.paired_assignments(
            rows=N, clusters=K, kinds=["one_hot"], relations=[relation], dtype=torch.float64
        )
    )


def test_identical_assignments() -> None:
    pairs = pairs_of_assignments("identical")
    assert all(a.equal(b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_noisy_assignments() -> None:
    shares = set()
    for first, second in pairs_of_assignments("noisy"):
        own = (first * second).sum(1)
        assert ((second.sum(1) - 1).abs() < 1e-12).all()
        shares |= {1 - Fraction(share) for share in own.tolist()}
    assert shares == {Fraction(0), *SHARES}


def test_independent_assignments() -> None:
    pairs = pairs_of_assignments("independent")
    assert all(b.eq(0).sum() == N * (K - 1) and b.eq(1).sum() == N for _, b in pairs)
    assert any((a * b).sum() == 0 for a, b in pairs)


def test_pairs_of_assignments_are_exact_in_double_precision() -> None:
    pairs = drawn(testing.paired_assignments(kinds=["ratios"], dtype=torch.float64), 60)
    assert all(((view.sum(1) - 1).abs() < 1e-15).all() for pair in pairs for view in pair)


def pairs_of_embeddings(relation: str) -> list[tuple[Tensor, Tensor]]:
    return drawn(
        testing.paired_embeddings(
            rows=N, features=D, kinds=["plain"], relations=[relation], dtype=torch.float64
        )
    )


def test_related_embeddings() -> None:
    same = pairs_of_embeddings("identical")
    assert all(a.equal(b) and a.data_ptr() != b.data_ptr() for a, b in same)
    assert all(a.equal(-b) for a, b in pairs_of_embeddings("opposite"))
    for relation, scale in (("noisy", 8), ("independent", 1)):
        pairs = pairs_of_embeddings(relation)
        added = [8 * (b - a) if scale == 8 else b for a, b in pairs]
        entries = {value for view in added for value in view.flatten().tolist()}
        assert entries == set(range(-4, 5))
        assert all(view.any(1).all() for view in added)
        assert any(not view.equal(a) for view, (a, _) in zip(added, pairs, strict=True))


# --- sizes ----------------------------------------------------------------------------------------


def test_sizes() -> None:
    for rows, wanted in ((2, {2}), ((2, 4), {2, 3, 4})):
        views: list[Any] = [
            drawn(testing.assignments(rows=rows), 50),
            drawn(testing.embeddings(rows=rows), 50),
            [pair[0] for pair in drawn(testing.paired_assignments(rows=rows), 50)],
            [pair[0] for pair in drawn(testing.paired_embeddings(rows=rows), 50)],
        ]
        assert all({len(view) for view in each} == wanted for each in views)
    for width, wanted in ((3, {3}), ((2, 4), {2, 3, 4})):
        columns: list[Any] = [
            drawn(testing.assignments(clusters=width), 50),
            drawn(testing.embeddings(features=width), 50),
            [pair[1] for pair in drawn(testing.paired_assignments(clusters=width), 50)],
            [pair[1] for pair in drawn(testing.paired_embeddings(features=width), 50)],
        ]
        assert all({view.shape[1] for view in each} == wanted for each in columns)
    assert {view.shape for view in drawn(testing.embeddings(), 400)} == {
        (n, d) for n in range(1, 7) for d in range(1, 6)
    }
    assert {view.shape for view in drawn(testing.assignments(), 400)} == {
        (n, k) for n in range(1, 7) for k in range(2, 6)
    }
    pairs: Any = [(testing.paired_assignments(), 2), (testing.paired_embeddings(), 1)]
    for strategy, least in pairs:
        sizes = [pair[0].shape for pair in drawn(strategy, 400)]
        assert {rows for rows, _ in sizes} == set(range(1, 7))
        assert {columns for _, columns in sizes} == set(range(least, 6))
    # One row, two clusters, one feature are the least, and allowed.
    assert drawn(testing.assignments(rows=1, clusters=2), 1)[0].shape == (1, 2)
    assert drawn(testing.embeddings(rows=1, features=1), 1)[0].shape == (1, 1)


def test_shards_are_all_partitions() -> None:
    wanted = {
        sizes
        for count in range(1, 5)
        for sizes in product(range(1, 6), repeat=count)
        if sum(sizes) == 5
    }
    assert set(drawn(testing.shards(5), 400)) == wanted
    assert {len(sizes) for sizes in drawn(testing.shards(5, max_shards=2))} == {1, 2}
    assert {sum(sizes) for sizes in drawn(testing.shards(), 400)} == set(range(1, 13))
