"""The invariants, one method each: it draws an example and says what is wrong with it.

A docstring is the invariant's line in the docs' table. Inputs are float64 unless an invariant is
about dtypes, so that tolerances are tight.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from torch import Tensor

from c2bin_ext.testing import _strategies as strategies
from c2bin_ext.testing._search import Loss, calling, differentiate, evaluate, search, show
from c2bin_ext.testing.presets import alignment, balance, contrast

Kind: TypeAlias = Literal["assignment", "assignment_pair", "embedding_pair"]
Problem: TypeAlias = "str | None"
NAMES: dict[str, tuple[str, ...]] = {
    "assignment": ("assignments",),
    "assignment_pair": ("assignments0", "assignments1"),
    "embedding_pair": ("prediction", "target"),
}
ALL = tuple(NAMES)
FORMULAS: dict[str, Any] = dict(zip(ALL, (balance, contrast, alignment), strict=True))
BOUNDS: dict[str, tuple[Any, Any]] = {
    "assignment": (0.0, math.log),
    # Cosines of columns lie in [0, 1], and 1/τ = 2.
    "assignment_pair": (
        lambda k: math.log1p((k - 1) * math.exp(-2)),
        lambda k: math.log1p((k - 1) * math.exp(2)),
    ),
    "embedding_pair": (0.0, 2.0),
}
# Entries whose squares do not vanish in float32: on either side of where a loss takes a norm for
# zero it may change with the scale, and neither is wrong.
ORDINARY = ("one_hot", "ratios", "uniform", "collapsed", "constant", "dead_cluster", "plain")
EVERYTHING = (*strategies.ASSIGNMENT_KINDS, *strategies.EMBEDDING_KINDS)
FACTORS = st.sampled_from((1.0, 2.0, 0.5, 100.0, 0.01))
ROUNDING = 1e-12  # of float64 sums in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HALF: dict[str, Any] = {"dtypes": strategies.DTYPES[2:], "rtol": 1e-4, "atol": 1e-4}
VALUE: dict[str, Any] = {"value": None, "formula": None, **CLOSE}
BALANCED: dict[str, Any] = {"rows_per_cluster": None, **VALUE}
ANGLES = ((0, 60), (60, 90), (90, 120), (120, 180))


class Invariant:
    """What losses of some kinds keep: a trial draws an example and says what is wrong with it."""

    def __init__(self, kinds: tuple[str, ...], holds: str, **options: Any) -> None:
        self.kinds, self.holds, self.options = kinds, holds, options

    def of(self, trial: Callable[[Trial], Problem]) -> Callable[[Trial], Problem]:
        """Register under the name of the trial."""
        self.name, self.trial, self.what = trial.__name__, trial, str(trial.__doc__)
        self.what = " ".join(self.what.split())
        REGISTRY[self.name] = self
        return trial

    def __call__(self, loss: Loss, /, kind: str = "", **given: Any) -> None:
        """Check a loss, in every dtype; `given` holds options and how and where to look."""
        __tracebackhide__ = True
        kind = kind or (ALL[1] if ALL[1] in self.kinds and self.name != SHARDS else self.kinds[0])
        looking = {k: given.pop(k) for k in ("max_examples", "derandomize") if k in given}
        where = {k: given.pop(k) for k in ("shapes", "device", "min_rows") if k in given}
        if kind not in self.kinds:
            raise ValueError(f"kind: {self.name} expected one of {self.kinds}, got {kind!r}")
        if unknown := sorted(set(given) - set(self.options)):
            known = tuple(self.options)
            raise ValueError(f"options: {self.name} expected some of {known}, got {unknown}")
        options = SimpleNamespace(**{**self.options, **given})
        dtypes = [*getattr(options, "dtypes", [torch.float64])]
        for dtype in dtypes + [torch.float32] * getattr(options, "autocast", False):
            trials = _trials(self, loss, kind, options, dtype, **where)
            try:
                search(self.name, self.holds, loss, trials, self.trial, **looking)
            except Unsatisfiable:  # no shape that was named says anything
                return


REGISTRY: dict[str, Invariant] = {}
SHARDS = "additive_over_shards"  # of a statistic rather than a loss


@dataclass(eq=False)
class Trial(dict[str, Any]):
    """One example, what is drawn by name, and the invariants, each of which judges one."""

    sample: Callable[[st.SearchStrategy[Any]], Any]
    invariant: Invariant
    loss: Loss
    kind: str
    options: SimpleNamespace
    given_dtype: torch.dtype
    shapes: Sequence[tuple[int, int]] | None = None
    device: str | torch.device = "cpu"
    min_rows: int = 1

    def __post_init__(self) -> None:
        self.names, self.embedded = NAMES[self.kind], self.kind == "embedding_pair"

    def draw(self, name: str, strategy: st.SearchStrategy[Any]) -> Any:
        self[name] = self.sample(strategy)
        return self[name]

    def inputs(self, *views: Tensor) -> list[Tensor]:
        """Take views for the inputs of the loss; one is repeated for a pair."""
        views = views if len(views) > 1 else views * len(self.names)
        self |= {n: x.clone().to(self.device) for n, x in zip(self.names, views, strict=True)}
        return [self[name] for name in self.names]

    def shape(self, rows: int = 1, columns: int = 1, most: tuple[int, int] = (6, 5)) -> Any:
        sizes = self.sizes(rows, columns, most)
        return [self.sample(strategies.size("shape", size, 1)) for size in sizes]

    def sizes(self, rows: int, columns: int, most: tuple[int, int]) -> Any:
        rows, columns = max(rows, self.min_rows), max(columns, 1 if self.embedded else 2)
        if self.shapes is None:
            return (rows, max(rows, most[0])), (columns, most[1])
        shape = self.sample(st.sampled_from(list(self.shapes)))
        assume(shape[0] >= rows and shape[1] >= columns)
        return shape

    def views(self, kinds: Sequence[str] = ORDINARY, most: tuple[int, int] = (6, 5)) -> Any:
        rows, columns = self.sizes(1, 1, most)
        known = strategies.EMBEDDING_KINDS if self.embedded else strategies.ASSIGNMENT_KINDS
        size = {"features" if self.embedded else "clusters": columns}
        pair = strategies.paired_embeddings if self.embedded else strategies.paired_assignments
        strategy: Any = strategies.assignments if self.kind == ALL[0] else pair
        kinds = [kind for kind in known if kind in kinds]
        views = self.sample(strategy(rows=rows, kinds=kinds, dtype=self.given_dtype, **size))
        return self.inputs(*([views] if isinstance(views, Tensor) else views))

    def value(self, views: Sequence[Tensor]) -> float:
        return evaluate(self.loss, views).item()

    def slack(self, expected: float) -> float:
        small: float = self.options.atol + self.options.rtol * abs(expected)
        return small if math.isfinite(expected) else 0.0

    def differ(self, found: float, expected: float) -> bool:
        # Equality first, for infinities. NaN fails both.
        return not (found == expected or abs(found - expected) <= self.slack(expected))

    def changes(self, views: Sequence[Tensor], changed: Sequence[Tensor], how: str) -> Problem:
        old, new = self.value(views), self.value(changed)
        return f"{_text(old)}, and {how} {_text(new)}" if self.differ(new, old) else None

    def misses(self, *drawn: Tensor) -> Problem:
        """Say that a value is not that of an option, or of C2BIN's formula."""
        views, value, formula = self.inputs(*drawn), self.options.value, self.options.formula
        if callable(value):
            value = value(views[0].shape[1])
        wanted = float((formula or FORMULAS[self.kind])(*views) if value is None else value)
        found = self.value(views)
        if not self.differ(found, wanted):
            return None
        option = "formula" if "formula" in self.invariant.holds else "value"
        hint = self.hint(option) if formula is None and value is None else ""
        return f"{_text(found)}, expected {_text(wanted)}{hint}"

    def hint(self, option: str) -> str:
        how = f"options={{{self.invariant.name!r}: {{{option!r}: ...}}}}"
        return f" (C2BIN's default; {how} expects another)"

    @Invariant(ALL, "L(rows in any order) = L(rows)", **CLOSE).of
    def instance_permutation(self) -> Problem:
        """the order of the instances does not matter, the same in both views"""
        views = self.views(EVERYTHING)
        order = self.draw("permutation", st.permutations(range(len(views[0]))))
        return self.changes(views, [x[order] for x in views], "with rows in another order")

    @Invariant(ALL[:2], "L(columns in any order) = L(columns)", **CLOSE).of
    def cluster_relabelling(self) -> Problem:
        """the order of the clusters does not matter, the same in both views"""
        views = self.views(EVERYTHING)
        order = self.draw("permutation", st.permutations(range(views[0].shape[1])))
        return self.changes(views, [x[:, order] for x in views], "with columns in another order")

    @Invariant(ALL[1:], "L(view 0, view 1) = L(view 1, view 0)", **CLOSE).of
    def view_swap(self) -> Problem:
        """neither view is preferred, in value"""
        views = self.views(EVERYTHING)
        return self.changes(views, views[::-1], "swapped")

    @Invariant(ALL[2:], "L(α p, β z) = L(p, z) for α, β > 0", **CLOSE).of
    def positive_scaling(self) -> Problem:
        """the lengths of embeddings do not matter, row by row"""
        views = self.views(("plain", "constant"))
        return self.changes(views, [x * f[:, None] for x, f in self.factors(views, 0)], "scaled")

    @Invariant(ALL[1:2], "L(α_k c'_k, β_k c''_k) = L(c'_k, c''_k) for α, β > 0", **CLOSE).of
    def column_scale(self) -> Problem:
        """the lengths of the clusters' columns do not matter; scaled rows do not sum to 1"""
        views = self.views(ORDINARY)
        return self.changes(views, [x * f for x, f in self.factors(views, 1)], "scaled")

    @Invariant(ALL, "L changes with every entry of every view").of
    def every_input_matters(self) -> Problem:
        """L changes with any entry of an embedding, and with mass that moves to the next cluster"""
        views = self.without_ties()
        # A loss may be flat where views agree well, but not with rows of one moved on as well.
        shifts = range(len(views))

        def values(views: list[Tensor]) -> list[float]:
            return [self.value([*views[:-1], views[-1].roll(shift, 0)]) for shift in shifts]

        before = values(views)
        for place, view in enumerate(views):
            for row, column in torch.cartesian_prod(*map(torch.arange, view.shape)).tolist():
                changed = view.clone()
                # A part that no simple fractions make up for by chance.
                moved = 0.37 * view[row, column]
                changed[row, column] += moved if self.embedded else -moved
                if not self.embedded:
                    changed[row, (column + 1) % view.shape[1]] += moved
                if all(map(_same, values(_with(views, place, changed)), before)):
                    where = f"row {row}, column {column} of `{self.names[place]}`"
                    return f"{where} does not matter: L stays {_text(before[0])}"
        return None

    @Invariant(ALL[1:], "L(x, y) ≠ L(x, y in another order)").of
    def compares_views(self) -> Problem:
        """L depends on which rows of both views belong together"""
        view0, view1 = self.without_ties()
        before = self.value([view0, view1])
        if not _same(self.value([view0, view1.roll(1, dims=0)]), before):
            return None
        return f"the views are not compared: L stays {_text(before)} with the rows of one moved on"

    @Invariant(ALL, "lower <= L <= upper", lower=None, upper=None, **CLOSE).of
    def bounds(self) -> Problem:
        """A: [0, log K]; AA: [log(1 + (K−1)e^(−1/τ)), log(1 + (K−1)e^(1/τ))]; EE: [0, 2]"""
        views, given = self.views(EVERYTHING), (self.options.lower, self.options.upper)
        found, columns = self.value(views), views[0].shape[1]
        limits = [b if a is None else a for a, b in zip(given, BOUNDS[self.kind], strict=True)]
        low, high = (float(x(columns) if callable(x) else x) for x in limits)
        if low - self.slack(low) <= found <= high + self.slack(high):
            return None
        side, own = ("upper", given[1]) if found > high else ("lower", given[0])
        hint = self.hint(side) if own is None else ""
        return f"{_text(found)}, outside of [{_text(low)}, {_text(high)}]{hint}"

    @Invariant(ALL[1:], "L(y, y) = L(α z, z) = value, y balanced", **BALANCED).of
    def value_at_agreement(self) -> Problem:
        """hard balanced clusters, alike: log(1 + (K−1)e^(−1/τ)); parallel embeddings: 0"""
        if not self.embedded:
            return self.misses(self.balanced())
        target = self.views(("plain", "constant"))[0]
        return self.misses(target * self.sample(FACTORS), target)

    @Invariant(ALL[1:2], "L(y, y with its clusters in a cycle) = value", **BALANCED).of
    def value_at_disagreement(self) -> Problem:
        """hard balanced clusters, those of one view in a cycle: log(K − 1 + e^(1/τ))"""
        view = self.balanced()
        return self.misses(view, view.roll(self.sample(st.integers(1, view.shape[1] - 1)), dims=1))

    @Invariant(ALL[2:], "L(p, z) = value where p ⊥ z", **VALUE).of
    def value_at_orthogonal(self) -> Problem:
        """orthogonal embeddings: 1"""
        return self.misses(*self.at_angle(90))

    @Invariant(ALL[2:], "L(p, −α p) = value for α > 0", **VALUE).of
    def value_at_opposite(self) -> Problem:
        """opposite embeddings: 2"""
        return self.misses(*self.at_angle(180))

    @Invariant(ALL[:1], "L(balanced one-hot) = value", **BALANCED).of
    def value_at_balance(self) -> Problem:
        """hard balanced clusters: 0"""
        return self.misses(self.balanced())

    @Invariant(ALL[:1], "L(P) = formula(P) for any shares of clusters", **VALUE).of
    def value_at_imbalance(self) -> Problem:
        """clusters with any shares ŝ, such as 3/4 and 1/4: log K − H(ŝ)"""
        return self.misses(*self.views())

    @Invariant(ALL[:2], "L(all in one cluster) = value", rows=None, **VALUE).of
    def value_at_collapse(self) -> Problem:
        """A: log K; AA: (log(1 + (K−1)e^(−1/τ)) + (K−1) log K) / K"""
        return self.misses(self.alike("collapsed"))

    @Invariant(ALL[:2], "L(1/K everywhere) = value", rows=None, **VALUE).of
    def value_at_uniform(self) -> Problem:
        """A: 0; AA: log K"""
        return self.misses(self.alike("uniform"))

    @Invariant(ALL[1:], "L(x, y) = formula(x, y)", **VALUE).of
    def value_in_general(self) -> Problem:
        """any inputs: what the plain formula gives, Eq. 4 or 1"""
        return self.misses(*self.views())

    @Invariant(ALL[:1], "L does not rise when mass moves to a lighter cluster", **CLOSE).of
    def monotone_entropy(self) -> Problem:
        """evening out the masses of two clusters never raises L"""
        part = self.draw("part_of_gap", st.sampled_from((0.5, 1.0, 0.25)))
        old, new, _, what = self.evened_out(EVERYTHING, part)
        return None if new <= old + self.slack(old) else what

    @Invariant(ALL, "L rises where agreement falls, strictly").of
    def strictly_monotone(self) -> Problem:
        """L rises with the angle of embeddings and with each row of every cluster that hard views
        disagree about; it falls with mass that moves to a lighter cluster"""
        if self.kind == "assignment":
            old, new, moved, what = self.evened_out(("ratios",), 0.25)
            return None if moved < 1e-3 or (new < old and not _same(new, old)) else what
        if self.embedded:
            # Rows are orthogonal, also to what they turn to: the angle only changes the positives.
            rows = max(self.min_rows, self.sample(st.integers(2, 4)))
            rows, columns = (rows, 2 * rows) if self.shapes is None else self.shape(1, 2)
            first = _one_hot(torch.arange(rows) % (columns // 2), columns)
            angles = self.draw("angles", st.sampled_from(ANGLES))
            turned = [_turned(first, angle) for angle in angles]
        else:
            labels, clusters = self.labels()
            repeats = len(labels) // clusters
            moved = self.draw("rows_of_each_cluster_moved", st.integers(0, repeats - 1))
            ahead = torch.arange(len(labels)) % repeats
            first = _one_hot(labels, clusters)
            others = [(labels + (ahead < m)) % clusters for m in (moved, moved + 1)]
            turned = [_one_hot(other, clusters) for other in others]
        view, nearer = self.inputs(first, turned[0])
        farther = self["with less agreement"] = turned[1].to(self.device)
        old, new = self.value([view, nearer]), self.value([view, farther])
        if new > old and not _same(new, old):
            return None
        return f"L is {_text(old)}, and with less agreement {_text(new)}, expected more"

    @Invariant(ALL, "value and gradient are finite", dtypes=strategies.DTYPES).of
    def finite(self) -> Problem:
        """at one-hot, uniform, collapsed, dead-cluster, zero, huge and tiny inputs, and n = 1"""
        value, gradients = differentiate(self.loss, self.views(EVERYTHING))
        if not torch.isfinite(value).all():
            return f"value {value.item()}"
        for name, slopes in zip(self.names, gradients, strict=True):
            if slopes is not None and not torch.isfinite(slopes).all():
                return f"gradient of `{name}` {show(slopes)}"
        return None

    @Invariant(ALL, "autograd = finite differences", of=None, rtol=1e-3, atol=1e-5).of
    def gradient(self) -> Problem:
        """of all inputs but the target, or of those that `of` names; rows keep their sum"""
        if self.embedded:
            views = self.views(("plain", "constant"), most=(4, 4))
        else:
            rows, columns = self.shape(most=(4, 4))
            weights = strategies.matrix(rows, columns, 1, 4)
            drawn = [torch.tensor(self.sample(weights), dtype=torch.float64) for _ in self.names]
            views = self.inputs(*(x / x.sum(dim=1, keepdim=True) for x in drawn))
        found = self.wrong_gradient(views)
        # Ties of small integers sit on the kinks of a max or a hinge, where there is no gradient to
        # compare with. A wrong gradient is as wrong elsewhere.
        for seed in (7, 11):
            moved = [self.moved(x, _direction(x, seed + i), 0.2) for i, x in enumerate(views)]
            found = found and self.wrong_gradient(moved) and found
        return found

    @Invariant(ALL[2:], "dL/d target = 0").of
    def no_gradient_to_target(self) -> Problem:
        """targets never get a gradient"""
        _, (_, slopes) = differentiate(self.loss, self.views(("plain", "constant")))
        # Where the gradient vanishes anyhow, its rounding error would make a poor example.
        if slopes is None or slopes.abs().max() <= 1e-9:
            return None
        return f"gradient of `target` {show(slopes)}"

    @Invariant(ALL, "0-dim, float32 at least, float64 stays", dtypes=strategies.DTYPES).of
    def dtype(self) -> Problem:
        """L is 0-dim; float64 for float64 inputs, float32 for all others"""
        value = evaluate(self.loss, self.views())
        wide = torch.promote_types(self.given_dtype, torch.float32)
        right = value.ndim == 0 and value.dtype is wide
        return None if right else f"shape {tuple(value.shape)}, {value.dtype}, expected (), {wide}"

    @Invariant(ALL, "L in lower precision = L in float32", autocast=True, **HALF).of
    def lower_precision(self) -> Problem:
        """half inputs, and float32 ones under autocast to bfloat16, give what float32 gives"""
        views = self.views()
        if self.given_dtype is not torch.float32:
            return self.changes([x.float() for x in views], views, f"in {self.given_dtype}")
        old = self.value(views)
        with torch.autocast(views[0].device.type, dtype=torch.bfloat16):
            new = self.value(views)
        what = f"{_text(old)}, and under autocast to bfloat16 {_text(new)}"
        return what if self.differ(new, old) else None

    @Invariant(ALL, "T(whole) = Σ_r T(shard r)", loss=None, from_sums=None, **CLOSE).of
    def additive_over_shards(self) -> Problem:
        """of a statistic T; with both options, L(P) = from_sums(Σ_r T(P_r)) and gradients agree"""
        options, views = self.options, self.views((*ORDINARY, "zero_row"))
        sizes = self.draw("shards", strategies.shards(len(views[0])))
        if (options.loss is None) != (options.from_sums is None):
            raise ValueError("loss, from_sums: expected both or neither")

        def summed(*views: Tensor, sizes: Sequence[int] = sizes) -> Any:
            parts = zip(*(torch.split(x, list(sizes)) for x in views), strict=True)
            found: list[Any] = [self.loss(*part) for part in parts]
            if isinstance(found[0], Tensor):
                return torch.stack(found).sum(dim=0)
            return [torch.stack(same).sum(dim=0) for same in zip(*found, strict=True)]

        with calling():
            sums = [summed(*(x.clone() for x in views), sizes=x) for x in (sizes, [len(views[0])])]
        rows = [[["statistic"], *([x] if isinstance(x, Tensor) else x for x in sums)]]
        rows[0][0] *= len(rows[0][1])
        if options.loss is not None:
            again, others = differentiate(lambda *x: options.from_sums(summed(*x)), views)
            value, slopes = differentiate(options.loss, views)
            rows.append([["value", *self.names], [again, *others], [value, *slopes]])
        for name, *both in (row for columns in rows for row in zip(*columns, strict=True)):
            have, want = (torch.zeros(()) if x is None else x for x in both)
            if not torch.allclose(
                have.double(), want.double(), rtol=options.rtol, atol=options.atol
            ):
                what = f"gradient of `{name}`" if name in self.names else name
                return f"{what} from sums over shards {show(have)}, whole {show(want)}"
        return None

    def factors(self, views: list[Tensor], axis: int) -> list[tuple[Tensor, Tensor]]:
        """Draw a factor for one row or column of each view, which all scalings are made of."""
        size, pairs = views[0].shape[axis], []
        for name, view in zip(self.names, views, strict=True):
            factors = [1.0] * size
            factors[self.sample(st.integers(0, size - 1))] = self.sample(FACTORS)
            pairs.append((view, view.new_tensor(self.draw(f"{name}_scale", st.just(factors)))))
        return pairs

    def without_ties(self) -> list[Tensor]:
        # Ties, of which integers that hypothesis shrinks are full, would cancel entries; no row of
        # distinct primes is a multiple of another. Alone, an instance has no negatives.
        rows, columns = self.shape(2, 2, (4, 4))
        drawn, size = random.Random(self.sample(st.integers(0, 99))), rows * columns
        sieve = range(2, max(60, 12 * size))
        primes = [p for p in sieve if all(p % q for q in range(2, math.isqrt(p) + 1))]
        samples = [torch.tensor(drawn.sample(primes, size)) for _ in self.names]
        views = [sample.double().view(rows, -1) for sample in samples]
        if not self.embedded:
            return self.inputs(*(x / x.sum(dim=1, keepdim=True) for x in views))
        signs = [torch.tensor(drawn.choices((-1, 1), k=size)).view(rows, -1) for _ in self.names]
        return self.inputs(*(x * sign for x, sign in zip(views, signs, strict=True)))

    def labels(self) -> tuple[Tensor, int]:
        if self.shapes is not None:
            rows, clusters = self.shape()
            if rows % clusters:
                raise ValueError(f"shapes: expected n a multiple of K, got {(rows, clusters)}")
            repeats = rows // clusters
        else:
            clusters = self.sample(st.integers(2, 4))
            given = getattr(self.options, "rows_per_cluster", None)
            size = (1, 3) if given is None else given
            repeats = self.sample(strategies.size("rows_per_cluster", size, 1))
            repeats = max(repeats, -(-self.min_rows // clusters))
        return torch.arange(clusters).repeat_interleave(repeats), clusters

    def balanced(self) -> Tensor:
        labels, clusters = self.labels()
        return _one_hot(labels[self.sample(st.permutations(range(len(labels))))], clusters)

    def at_angle(self, degrees: float) -> tuple[Tensor, Tensor]:
        rows, columns = self.shape(1, 2, (6, 6))
        prediction = torch.zeros(rows, columns, dtype=self.given_dtype)
        half = strategies.embeddings(rows=rows, features=columns // 2, kinds=["plain"])
        prediction[:, : columns // 2] = self.sample(half)
        return prediction, _turned(prediction, degrees) * self.sample(FACTORS)

    def alike(self, kind: str) -> Tensor:
        rows, clusters = self.shape()
        rows = self.options.rows if self.options.rows and self.shapes is None else rows
        view = strategies.assignments(rows=rows, clusters=clusters, kinds=[kind])
        return self.sample(view.map(torch.Tensor.double))  # type: ignore[no-any-return]

    def evened_out(self, kinds: Sequence[str], part: float) -> tuple[float, float, float, str]:
        """Move a part of what one cluster has more than another; return L, L after, what moved."""
        (before,) = self.views(kinds)
        a, b = self.draw("clusters", st.permutations(range(before.shape[1])).map(lambda x: x[:2]))
        mass = before.sum(dim=0)
        heavier, lighter = (a, b) if mass[a] >= mass[b] else (b, a)
        gap = part * (mass[heavier] - mass[lighter])
        # The floor is for two empty clusters, between which nothing moves.
        moved = before[:, heavier] * (gap / mass[heavier].clamp_min(1e-300))
        after = before.clone()
        after[:, heavier] -= moved
        after[:, lighter] += moved
        old, new = self.value([before]), self.value([after])
        where = f"mass {gap:.6g} from column {heavier} to the lighter column {lighter}"
        return old, new, gap.item(), f"moving {where} takes L from {_text(old)} to {_text(new)}"

    def wrong_gradient(self, views: list[Tensor]) -> Problem:
        _, gradients = differentiate(self.loss, views)
        for place in map(
            self.names.index, self.options.of or (self.names[:1] if self.embedded else self.names)
        ):
            view, slopes, name = views[place], gradients[place], self.names[place]
            for direction in (_direction(view, seed) for seed in (0, 1)):
                step = self.moved(view, direction, 1) - view
                terms = torch.zeros_like(view) if slopes is None else step * slopes
                slope, scale = terms.sum().item(), terms.abs().sum().item()
                # A loss that computes in float32 needs the second step: the first is in its noise.
                for h in (1e-3, 3e-2):
                    ends = (self.moved(view, direction, h * x) for x in (1, -1, 0.5, -0.5))
                    a, b, c, d = (self.value(_with(views, place, end)) for end in ends)
                    wide, narrow = (a - b) / (2 * h), (c - d) / h
                    numeric = (4 * narrow - wide) / 3
                    allowed = self.options.atol + self.options.rtol * max(scale, abs(numeric))
                    if abs(numeric - slope) <= allowed + abs(narrow - wide):
                        break
                else:
                    if not terms.any():
                        return f"no gradient reaches `{name}`, and L changes with it"
                    found = f"{_text(slope)} along a line, by finite differences {_text(numeric)}"
                    return f"gradient of `{name}`: {found}"
        return None

    def moved(self, view: Tensor, direction: Tensor, step: float) -> Tensor:
        if self.embedded:
            return view + step * direction
        # As through a softmax: rows still sum to 1.
        return view * (1 + step * (direction - (view * direction).sum(dim=1, keepdim=True)))


@st.composite
def _trials(draw: st.DrawFn, *fields: Any, **where: Any) -> Trial:
    return Trial(draw, *fields, **where)


def _direction(view: Tensor, seed: int) -> Tensor:
    steps = torch.arange(1, view.numel() + 1, dtype=view.dtype, device=view.device)
    return (steps * (37 + seed)).sin().reshape(view.shape)


def _turned(view: Tensor, degrees: float) -> Tensor:
    """Turn rows, whose right half is zero, by an angle; exactly where its cosine or sine is 0."""
    cosine, sine = (round(f(math.radians(degrees)), 15) for f in (math.cos, math.sin))
    return cosine * view + sine * view.roll(view.shape[1] // 2, dims=1)


def _one_hot(labels: Tensor, clusters: int) -> Tensor:
    return torch.eye(clusters, dtype=torch.float64)[labels]


def _with(views: Sequence[Tensor], place: int, view: Tensor) -> list[Tensor]:
    return [*views[:place], view, *views[place + 1 :]]


def _same(new: float, old: float) -> bool:
    return abs(new - old) <= ROUNDING * max(1.0, abs(old))


def _text(number: float) -> str:
    return f"{number + 0.0:.9g}"  # adding 0 turns -0 into 0
