"""The invariants, one method each, whose docstring is its line in the docs' table."""

from __future__ import annotations

import math
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
# A loss, or for `additive_over_shards` what returns one tensor or several.
Statistic: TypeAlias = "Callable[..., Tensor | Sequence[Tensor]]"
NAMES: dict[str, tuple[str, ...]] = {
    "assignment": ("assignments",),
    "assignment_pair": ("assignments0", "assignments1"),
    "embedding_pair": ("prediction", "target"),
}
ALL = tuple(NAMES)
FORMULAS: dict[str, Any] = dict(zip(ALL, (balance, contrast, alignment), strict=True))
# Entries whose squares do not vanish in float32: on either side of where a loss takes a norm for
# zero it may change with the scale, and neither is wrong.
ORDINARY = ("one_hot", "ratios", "uniform", "collapsed", "constant", "dead_cluster", "plain")
EVERYTHING = (*strategies.ASSIGNMENT_KINDS, *strategies.EMBEDDING_KINDS)
FACTORS = st.sampled_from((1.0, 2.0, 0.5, 100.0, 0.01))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HALF: dict[str, Any] = {"dtypes": strategies.DTYPES[2:], "rtol": 1e-4, "atol": 1e-4}
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

    def __call__(self, loss: Statistic, /, kind: str = "", **given: Any) -> None:
        """Check a loss, in every dtype; `given` holds options and how and where to look."""
        __tracebackhide__ = True
        kind = kind or (ALL[1] if ALL[1] in self.kinds and self.name != SHARDS else self.kinds[0])
        looking = {k: given.pop(k) for k in ("max_examples", "derandomize") if k in given}
        where = {k: given.pop(k) for k in ("shapes", "device", "min_rows") if k in given}
        if kind not in self.kinds:
            raise ValueError(f"kind: {self.name} expected one of {self.kinds}, got {kind!r}")
        if unknown := sorted(set(given) - set(self.options)):
            raise ValueError(f"options: {self.name} expected {[*self.options]}, got {unknown}")
        strategies.known("inputs", given.get("inputs", ORDINARY), EVERYTHING)
        options = SimpleNamespace(**{**self.options, **given})
        dtypes = [*getattr(options, "dtypes", [torch.float64])]  # float64: tolerances are tight
        for dtype in dtypes + [torch.float32] * getattr(options, "autocast", False):
            trials = _trials(loss, kind, options, dtype, **where)
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
        self |= {n: x.clone().to(self.device) for n, x in zip(self.names, views, strict=True)}
        return [self[name] for name in self.names]

    def shape(self, rows: int = 1, columns: int = 1, most: Sequence[int] = (6, 5)) -> Sequence[int]:
        rows, columns = max(rows, self.min_rows), max(columns, 1 if self.embedded else 2)
        if self.shapes is None:
            sizes = st.integers(rows, max(rows, most[0])), st.integers(columns, most[1])
            return [self.sample(size) for size in sizes]
        shape: tuple[int, int] = self.sample(st.sampled_from(list(self.shapes)))
        assume(shape[0] >= rows and shape[1] >= columns)
        return shape

    def views(self, kinds: Sequence[str] = ORDINARY) -> list[Tensor]:
        rows, columns = self.shape()
        known = strategies.EMBEDDING_KINDS if self.embedded else strategies.ASSIGNMENT_KINDS
        pair = strategies.paired_embeddings if self.embedded else strategies.paired_assignments
        strategy: Any = strategies.assignments if self.kind == ALL[0] else pair
        how: Any = {"features" if self.embedded else "clusters": columns, "dtype": self.given_dtype}
        views = self.sample(strategy(rows=rows, kinds=[k for k in known if k in kinds], **how))
        return self.inputs(*([views] if isinstance(views, Tensor) else views))

    def without_ties(self, rows: int) -> list[Tensor]:
        # Ties, of which integers that hypothesis shrinks are full, would cancel entries, and sit on
        # the kinks of a max or a hinge. The half keeps entries of embeddings off zero.
        size = self.shape(rows, 2, (3, 4))
        drawn = torch.Generator().manual_seed(self.sample(st.integers(0, 99)))
        views = [torch.randint(1, 1000, list(size), generator=drawn).double() for _ in self.names]
        if self.embedded:
            return self.inputs(*((x - 500.5) / 100 for x in views))
        return self.inputs(*(x / x.sum(dim=1, keepdim=True) for x in views))

    def value(self, views: Sequence[Tensor]) -> float:
        return evaluate(self.loss, views).item()

    def close(self, found: float, expected: float) -> bool:
        return math.isclose(found, expected, rel_tol=self.options.rtol, abs_tol=self.options.atol)

    def changes(self, views: Sequence[Tensor], changed: Sequence[Tensor], how: str) -> Problem:
        old, new = self.value(views), self.value(changed)
        return None if self.close(new, old) else f"{_text(old)}, and {how} {_text(new)}"

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

    @Invariant(ALL[1:], "L(α x, β y) = L(x, y) for α, β > 0", **CLOSE).of
    def positive_scaling(self) -> Problem:
        """the lengths of what is compared do not matter: rows of embeddings, clusters' columns"""
        views, axis = self.views(), 0 if self.embedded else 1
        size = views[0].shape[axis]
        factors = st.lists(FACTORS, min_size=size, max_size=size).map(views[0].new_tensor)
        drawn = [self.draw(f"{name}_scale", factors).unsqueeze(1 - axis) for name in self.names]
        changed = [x * y for x, y in zip(views, drawn, strict=True)]
        return self.changes(views, changed, "scaled")

    @Invariant(ALL, "L changes with every entry of every view").of
    def every_input_matters(self) -> Problem:
        """L changes with any entry of any view, and with which rows of two views are paired"""
        views = self.without_ties(2)  # alone, an instance has no negatives

        # A loss may be flat where views agree well, but not with rows of one moved on as well.
        def values(views: list[Tensor]) -> list[float]:
            return [self.value([*views[:-1], views[-1].roll(x, 0)]) for x in range(len(views))]

        before = values(views)
        for place, view in enumerate(views):
            for row, column in torch.cartesian_prod(*map(torch.arange, view.shape)).tolist():
                changed = view.clone()
                changed[row, column] *= 0.63
                if not self.embedded:
                    changed[row, (column + 1) % view.shape[1]] += 0.37 * view[row, column]
                if all(map(_same, values(_with(views, place, changed)), before)):
                    where = f"row {row}, column {column} of `{self.names[place]}`"
                    return f"{where} does not matter: L stays {_text(before[0])}"
        same = len(views) > 1 and _same(*before)
        return f"the views are not compared: L stays {_text(before[0])}" if same else None

    @Invariant(ALL, "lower <= L <= upper", lower=0.0, upper=math.inf, **CLOSE).of
    def bounds(self) -> Problem:
        """L is not below 0, or within bounds that are numbers or functions of K (of d)"""
        views, given = self.views(EVERYTHING), (self.options.lower, self.options.upper)
        low, high = (x(views[0].shape[1]) if callable(x) else x for x in given)
        found = self.value(views)
        if low <= found <= high or self.close(found, low) or self.close(found, high):
            return None
        return f"{_text(found)}, outside of [{_text(low)}, {_text(high)}]"

    @Invariant(ALL, "L = formula of the inputs", formula=None, inputs=ORDINARY, **CLOSE).of
    def follows_formula(self) -> Problem:
        """L has the values of a plain formula, by default C2BIN's; `inputs` are kinds of inputs"""
        views, formula = self.views(self.options.inputs), self.options.formula
        found, wanted = self.value(views), float((formula or FORMULAS[self.kind])(*views))
        default = "" if formula else " (C2BIN's default; the option `formula` expects another)"
        problem = f"{_text(found)}, expected {_text(wanted)}{default}"
        return None if self.close(found, wanted) else problem

    @Invariant(ALL, "L rises where agreement falls, strictly").of
    def strictly_monotone(self) -> Problem:
        """L rises with the angle of embeddings, with rows moved between clusters, with imbalance"""
        if self.kind == "assignment":
            (farther,) = self.views(("ratios",))
            pairs = st.permutations(range(farther.shape[1])).map(lambda order: order[:2])
            mass, clusters = farther.sum(dim=0), self.draw("clusters", pairs)
            lighter, heavier = sorted(clusters, key=lambda cluster: mass[cluster])
            share = (1 - mass[lighter] / mass[heavier]) / 4
            assume(mass[heavier] * share > 1e-3)
            nearer = farther.clone()
            nearer[:, lighter] += share * farther[:, heavier]
            nearer[:, heavier] -= share * farther[:, heavier]
            views = [nearer, farther]
        elif self.embedded:
            # Rows are orthogonal, also to what they turn to: the angle only changes the positives.
            rows = max(self.min_rows, self.sample(st.integers(2, 4)))
            rows, columns = (rows, 2 * rows) if self.shapes is None else self.shape(1, 2)
            view = _one_hot(torch.arange(rows) % (columns // 2), columns)
            other = view.roll(columns // 2, dims=1)
            angles = map(math.radians, (*self.draw("angles", st.sampled_from(ANGLES)), 0))
            views = [math.cos(x) * view + math.sin(x) * other for x in angles]
        else:
            rows, clusters = self.shape(2, 2, (12, 4))
            assume(rows % clusters == 0)
            place, labels = torch.arange(rows) // clusters, torch.arange(rows) % clusters
            moved = self.draw("rows_of_each_cluster_moved", st.integers(0, rows // clusters - 1))
            others = (labels + (place < m) for m in (moved, moved + 1, 0))
            views = [_one_hot(other % clusters, clusters) for other in others]
        nearer, farther, *first = (x.to(self.device) for x in views)
        self |= zip(("nearer", "farther", "first"), (nearer, farther, *first), strict=False)
        old, new = self.value([*first, nearer]), self.value([*first, farther])
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

    @Invariant(ALL, "autograd = numeric; 0 for the target", of=None, rtol=1e-3, atol=1e-5).of
    def gradient(self) -> Problem:
        """of inputs that `of` names, all but the target by default; others, such as it, get none"""
        views = self.without_ties(1)
        _, gradients = differentiate(self.loss, views)
        trained = self.options.of or (self.names[:1] if self.embedded else self.names)
        for place, (name, slopes) in enumerate(zip(self.names, gradients, strict=True)):
            view = views[place]
            if name not in trained:
                # Where a gradient vanishes anyhow, rounding would leave something of it.
                if slopes is None or slopes.abs().max() <= 1e-9:
                    continue
                return f"gradient of `{name}` {show(slopes)}, expected none"
            step = (37.0 * torch.arange(1, view.numel() + 1).to(view)).sin().view_as(view)
            if not self.embedded:
                # As through a softmax: rows still sum to 1.
                step = view * (step - (view * step).sum(dim=1, keepdim=True))
            terms = torch.zeros_like(view) if slopes is None else step * slopes
            slope, scale = terms.sum().item(), terms.abs().sum().item()
            # A loss that computes in float32 needs the second step: the first is in its noise.
            for h in (1e-3, 3e-2):
                ends = [_with(views, place, view + x * h * step) for x in (1, -1, 0.5, -0.5)]
                a, b, c, d = map(self.value, ends)
                wide, narrow = (a - b) / (2 * h), (c - d) / h
                allowed = self.options.atol + self.options.rtol * max(scale, abs(narrow))
                if abs(narrow - slope) <= allowed + abs(narrow - wide):
                    break
            else:
                if not terms.any():
                    return f"no gradient reaches `{name}`, and L changes with it"
                found = f"{_text(slope)} along a line, by finite differences {_text(narrow)}"
                return f"gradient of `{name}`: {found}"
        return None

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
        return None if self.close(new, old) else what

    @Invariant(ALL, "T(whole) = Σ_r T(shard r)", **CLOSE).of
    def additive_over_shards(self) -> Problem:
        """of a statistic T, a tensor or several, whose sum over ranks a distributed loss takes"""
        views = self.views((*ORDINARY, "zero_row"))
        sizes = self.draw("shards", strategies.shards(len(views[0])))
        parts: Any = zip(*(torch.split(x, list(sizes)) for x in views), strict=True)
        with calling():
            whole, *found = [self.loss(*part) for part in [views, *parts]]
        columns: Any = (
            [[whole, *found]] if isinstance(whole, Tensor) else zip(whole, *found, strict=True)
        )
        for want, *shares in columns:
            have = torch.stack(shares).sum(dim=0)
            if not torch.allclose(have, want, rtol=self.options.rtol, atol=self.options.atol):
                return f"from sums over shards {show(have)}, whole {show(want)}"
        return None


@st.composite
def _trials(draw: st.DrawFn, *fields: Any, **where: Any) -> Trial:
    return Trial(draw, *fields, **where)


def _one_hot(labels: Tensor, clusters: int) -> Tensor:
    return torch.eye(clusters, dtype=torch.float64)[labels]


def _with(views: Sequence[Tensor], place: int, view: Tensor) -> list[Tensor]:
    return [*views[:place], view, *views[place + 1 :]]


def _same(new: float, old: float) -> bool:
    return math.isclose(new, old, rel_tol=1e-12, abs_tol=1e-12)  # sums in another order


def _text(number: float) -> str:
    return f"{number + 0.0:.9g}"  # adding 0 turns -0 into 0
