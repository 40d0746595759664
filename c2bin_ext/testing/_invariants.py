"""The invariants, one function each: what is a problem of an example, beside how it is drawn.

A docstring is a line of the docs' table, and `options` are what users may set. Inputs are float64
unless an invariant is about dtypes, so that tolerances are tight.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

from c2bin_ext.testing import _strategies as strategies
from c2bin_ext.testing._search import Example, Loss, calling, differentiate, evaluate, search, show
from c2bin_ext.testing.presets import alignment, balance, contrast

Kind: TypeAlias = Literal["assignment", "assignment_pair", "embedding_pair"]
Shape: TypeAlias = tuple[int, int]
Draw: TypeAlias = Callable[["Check", st.DrawFn], Example]
Problem: TypeAlias = Callable[["Check", Loss, Example], "str | None"]

NAMES: dict[str, tuple[str, ...]] = {
    "assignment": ("assignments",),
    "assignment_pair": ("assignments0", "assignments1"),
    "embedding_pair": ("prediction", "target"),
}
ALL = tuple(NAMES)
# Entries whose squares do not vanish in float32: on either side of where a loss takes a norm for
# zero it may change with the scale, and neither is wrong.
ORDINARY = ("one_hot", "ratios", "uniform", "collapsed", "constant", "dead_cluster")
SOFT, PLAIN = (*ORDINARY, "softmax"), ("plain", "constant")
FACTORS = (1.0, 2.0, 0.5, 100.0, 0.01)
ROUNDING = 1e-12  # of float64 sums in another order
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "assignment": balance,
    "assignment_pair": contrast,
    "embedding_pair": alignment,
}
BOUNDS: dict[str, tuple[Any, Any]] = {
    "assignment": (0.0, math.log),
    # Cosines of columns lie in [0, 1], and 1/τ = 2.
    "assignment_pair": (
        lambda k: math.log1p((k - 1) * math.exp(-2)),
        lambda k: math.log1p((k - 1) * math.exp(2)),
    ),
    "embedding_pair": (0.0, 2.0),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class Search:
    """How long to look for a counterexample, and among which inputs."""

    max_examples: int = 50
    derandomize: bool = True
    shapes: Sequence[Shape] | None = None
    device: str | torch.device = "cpu"
    min_rows: int = 1


@dataclass(frozen=True)
class Invariant:
    """What losses of some kinds keep: how to draw an example, and what is a problem of it."""

    name: str
    kinds: tuple[str, ...]
    what: str
    holds: str
    problem: Problem
    draw: Draw
    options: Mapping[str, Any]
    assignments: tuple[str, ...] = strategies.ASSIGNMENT_KINDS
    embeddings: tuple[str, ...] = strategies.EMBEDDING_KINDS
    least: Shape = (1, 1)  # n and K or d, below which nothing is to be seen
    most: Shape = (6, 5)
    of_losses: bool = True


REGISTRY: dict[str, Invariant] = {}


class Check:
    """An invariant for one kind of loss, with its options and the search."""

    def __init__(self, invariant: Invariant, kind: str, looking: Search, **options: Any) -> None:
        name, known = invariant.name, tuple(invariant.options)
        if kind not in invariant.kinds:
            raise ValueError(f"kind: expected one of {invariant.kinds} for {name}, got {kind!r}")
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"options of {name}: expected some of {known}, got {unknown}")
        self.invariant, self.kind, self.looking, self.names = invariant, kind, looking, NAMES[kind]
        self.options = SimpleNamespace(**{**invariant.options, **options})
        columns = max(invariant.least[1], 1 if kind == "embedding_pair" else 2)
        self.least = max(invariant.least[0], looking.min_rows), columns

    def __call__(self, loss: Loss) -> None:
        """Search in every dtype, each with all the extremes."""
        __tracebackhide__ = True
        looking, of = self.looking, self.invariant
        if looking.shapes is not None and not self.shapes():
            return
        dtypes = getattr(self.options, "dtypes", [torch.float64])
        for dtype in [*dtypes, *[torch.float32] * getattr(self.options, "autocast", False)]:
            self.dtype = dtype
            search(
                *(of.name, of.holds, loss, _examples(self), partial(of.problem, self, loss)),
                max_examples=looking.max_examples,
                derandomize=looking.derandomize,
            )

    def shapes(self) -> list[Shape]:
        """Return the shapes that users named in which something is to be seen."""
        return [s for s in self.looking.shapes or () if min(map(int.__sub__, s, self.least)) >= 0]

    def shape(self, draw: st.DrawFn) -> Shape:
        """Draw rows and columns."""
        if self.looking.shapes is not None:
            return draw(st.sampled_from(self.shapes()))
        (rows, columns), most = self.least, self.invariant.most
        return draw(st.integers(rows, max(rows, most[0]))), draw(st.integers(columns, most[1]))

    def named(self, *views: Tensor) -> Example:
        """Name the inputs of the loss; one view is repeated for a pair."""
        views = views if len(views) > 1 else tuple(views[0].clone() for _ in self.names)
        return dict(zip(self.names, views, strict=True))

    def inputs(self, example: Example) -> list[Tensor]:
        """Return the inputs of the loss in an example."""
        return [example[name] for name in self.names]

    def slack(self, expected: float) -> float:
        """Return how far off a value may be."""
        small: float = self.options.atol + self.options.rtol * abs(expected)
        return small if math.isfinite(expected) else 0.0

    def differs(self, found: float, expected: float, how: str) -> str | None:
        """Say that two values differ. Equality is first, for infinities; NaN fails both."""
        if found == expected or abs(found - expected) <= self.slack(expected):
            return None
        return f"{_text(expected)}, and {how} {_text(found)}"


@st.composite
def _examples(draw: st.DrawFn, check: Check) -> Example:
    drawn, device = check.invariant.draw(check, draw), check.looking.device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in drawn.items()}


def _views(check: Check, draw: st.DrawFn) -> Example:
    rows, columns = check.shape(draw)
    if check.kind == "embedding_pair":
        strategy: Any = partial(strategies.paired_embeddings, features=columns)
    elif check.kind == "assignment_pair":
        strategy = partial(strategies.paired_assignments, clusters=columns)
    else:
        strategy = partial(strategies.assignments, clusters=columns)
    of = check.invariant
    kinds = of.embeddings if check.kind == "embedding_pair" else of.assignments
    views = draw(strategy(rows=rows, kinds=kinds, dtype=check.dtype))
    return check.named(*([views] if isinstance(views, Tensor) else views))


def invariant(
    kinds: tuple[str, ...],
    holds: str,
    *,
    draw: Draw = _views,
    name: str = "",
    what: str = "",
    options: Mapping[str, Any] = CLOSE,
    **fields: Any,
) -> Callable[[Problem], Problem]:
    """Register a function as an invariant: what is wrong with an example, None where nothing is."""

    def register(problem: Problem) -> Problem:
        named = name or problem.__name__
        text = " ".join((what or problem.__doc__ or "").split())
        REGISTRY[named] = Invariant(named, kinds, text, holds, problem, draw, options, **fields)
        return problem

    return register


def _permuted(check: Check, draw: st.DrawFn) -> Example:
    example = _views(check, draw)
    rows, columns = example[check.names[0]].shape
    size = rows if check.invariant.name == "instance_permutation" else columns
    return example | {"permutation": draw(st.permutations(range(size)))}


@invariant(ALL, "L(rows in any order) = L(rows)", draw=_permuted)
def instance_permutation(check: Check, loss: Loss, example: Example) -> str | None:
    """the order of the instances does not matter, the same in both views"""
    inputs, order = check.inputs(example), example["permutation"]
    found, expected = _value(loss, [x[order] for x in inputs]), _value(loss, inputs)
    return check.differs(found, expected, "with rows in another order")


@invariant(ALL[:2], "L(columns in any order) = L(columns)", draw=_permuted)
def cluster_relabelling(check: Check, loss: Loss, example: Example) -> str | None:
    """the order of the clusters does not matter, the same in both views"""
    inputs, order = check.inputs(example), example["permutation"]
    found, expected = _value(loss, [x[:, order] for x in inputs]), _value(loss, inputs)
    return check.differs(found, expected, "with columns in another order")


@invariant(ALL[1:], "L(view 0, view 1) = L(view 1, view 0)")
def view_swap(check: Check, loss: Loss, example: Example) -> str | None:
    """neither view is preferred, in value"""
    inputs = check.inputs(example)
    return check.differs(_value(loss, inputs[::-1]), _value(loss, inputs), "swapped")


def _scaled(check: Check, draw: st.DrawFn) -> Example:
    example = _views(check, draw)
    rows, columns = example[check.names[0]].shape
    size = rows if check.kind == "embedding_pair" else columns
    for name in check.names:
        # One row or column at a time: compositions of these are all scalings.
        factors = [1.0] * size
        factors[draw(st.integers(0, size - 1))] = draw(st.sampled_from(FACTORS))
        example[f"{name}_scale"] = factors
    return example


@invariant(
    ALL[2:], "L(α p, β z) = L(p, z) for α, β > 0", name="positive_scaling", draw=_scaled,
    what="the lengths of embeddings do not matter, row by row", embeddings=PLAIN,
)  # fmt: skip
@invariant(
    ALL[1:2], "L(α_k c'_k, β_k c''_k) = L(c'_k, c''_k) for α, β > 0", name="column_scale",
    what="the lengths of the clusters' columns do not matter; scaled rows do not sum to 1",
    draw=_scaled, assignments=ORDINARY,
)  # fmt: skip
def _scaling(check: Check, loss: Loss, example: Example) -> str | None:
    inputs = check.inputs(example)
    factors = [inputs[0].new_tensor(example[f"{name}_scale"]) for name in check.names]
    if check.kind == "embedding_pair":
        factors = [factor[:, None] for factor in factors]
    scaled = [x * factor for x, factor in zip(inputs, factors, strict=True)]
    return check.differs(_value(loss, scaled), _value(loss, inputs), "scaled")


def _without_ties(check: Check, draw: st.DrawFn) -> Example:
    # Integers that hypothesis shrinks would be full of ties, which hide what does not matter.
    shape, seed = check.shape(draw), draw(st.integers(0, 99))
    drawn, views = random.Random(seed), []
    for _ in check.names:
        entries = torch.tensor(drawn.choices(range(1, 17), k=shape[0] * shape[1])).double()
        signs = torch.tensor(drawn.choices((-1, 1), k=len(entries)))
        entries = entries * signs if check.kind == "embedding_pair" else entries
        view = entries.reshape(shape)
        views.append(view if check.kind == "embedding_pair" else view / view.sum(1, keepdim=True))
    return check.named(*views)


@invariant(
    ALL, "L changes with every entry of every view", draw=_without_ties, options={},
    least=(2, 2), most=(4, 4),
)  # fmt: skip
def every_input_matters(check: Check, loss: Loss, example: Example) -> str | None:
    """L changes with any entry of an embedding, and with mass that moves to the next cluster"""
    inputs = check.inputs(example)
    before = _value(loss, inputs)
    for place, view in enumerate(inputs):
        for row, column in torch.cartesian_prod(*map(torch.arange, view.shape)).tolist():
            changed = view.clone()
            # A part that no simple fractions make up for by chance.
            moved = 0.37 * view[row, column]
            changed[row, column] += moved if check.kind == "embedding_pair" else -moved
            if check.kind != "embedding_pair":
                changed[row, (column + 1) % view.shape[1]] += moved
            if _same(_value(loss, _with(inputs, place, changed)), before):
                where = f"row {row}, column {column} of `{check.names[place]}`"
                return f"{where} does not matter: L stays {_text(before)}"
    return None


@invariant(
    ALL[1:], "L(x, y) ≠ L(x, y in another order)", draw=_without_ties, options={},
    least=(2, 2), most=(4, 4),
)  # fmt: skip
def compares_views(check: Check, loss: Loss, example: Example) -> str | None:
    """L depends on which rows of both views belong together"""
    view0, view1 = check.inputs(example)
    before = _value(loss, [view0, view1])
    if not _same(_value(loss, [view0, view1.roll(1, dims=0)]), before):
        return None
    return f"the views are not compared: L stays {_text(before)} with the rows of one moved on"


@invariant(ALL, "lower <= L <= upper", options={"lower": None, "upper": None, **CLOSE})
def bounds(check: Check, loss: Loss, example: Example) -> str | None:
    """A: [0, log K]; AA: [log(1 + (K−1)e^(−1/τ)), log(1 + (K−1)e^(1/τ))]; EE: [0, 2]"""
    inputs, given = check.inputs(example), (check.options.lower, check.options.upper)
    found, columns = _value(loss, inputs), inputs[0].shape[1]
    limits = (b if a is None else a for a, b in zip(given, BOUNDS[check.kind], strict=True))
    low, high = (float(x(columns) if callable(x) else x) for x in limits)
    if low - check.slack(low) <= found <= high + check.slack(high):
        return None
    hint = _of_c2bin(check, "upper" if found > high else "lower")
    return f"{_text(found)}, outside of [{_text(low)}, {_text(high)}]{hint}"


def _labels(check: Check, draw: st.DrawFn) -> tuple[Tensor, int]:
    if check.looking.shapes is not None:
        rows, clusters = check.shape(draw)
        if rows % clusters:
            raise ValueError(f"shapes: expected n a multiple of K, got {(rows, clusters)}")
        repeats = rows // clusters
    else:
        clusters = draw(st.integers(2, 4))
        size = getattr(check.options, "rows_per_cluster", None) or (1, 3)
        repeats = draw(strategies.size("rows_per_cluster", size, 1))
        repeats = max(repeats, -(-check.looking.min_rows // clusters))
    return torch.arange(clusters).repeat_interleave(repeats), clusters


def _balanced(check: Check, draw: st.DrawFn) -> Example:
    labels, clusters = _labels(check, draw)
    return check.named(_one_hot(labels[draw(st.permutations(range(len(labels))))], clusters))


def _agreeing(check: Check, draw: st.DrawFn) -> Example:
    if check.kind == "assignment_pair":
        return _balanced(check, draw)
    target = _views(check, draw)["prediction"]
    return check.named(target * draw(st.sampled_from(FACTORS)), target)


def _disagreeing(check: Check, draw: st.DrawFn) -> Example:
    view0, view1 = _balanced(check, draw).values()
    return check.named(view0, view1.roll(draw(st.integers(1, view1.shape[1] - 1)), dims=1))


def _at_angle(check: Check, draw: st.DrawFn) -> Example:
    rows, columns = check.shape(draw)
    half = draw(strategies.embeddings(rows=rows, features=columns // 2, kinds=["plain"]))
    prediction = torch.zeros(rows, columns, dtype=torch.float64)
    prediction[:, : half.shape[1]] = half
    turned = _turned(prediction, 90 if check.invariant.name == "value_at_orthogonal" else 180)
    return check.named(prediction, turned * draw(st.sampled_from(FACTORS)))


def _alike(check: Check, draw: st.DrawFn) -> Example:
    rows, clusters = check.shape(draw)
    if check.looking.shapes is None and check.options.rows is not None:
        rows = check.options.rows
    kinds = check.invariant.assignments
    view = draw(strategies.assignments(rows=rows, clusters=clusters, kinds=kinds))
    return check.named(view.double())


def _value_at(check: Check, loss: Loss, example: Example) -> str | None:
    inputs, value, formula = check.inputs(example), check.options.value, check.options.formula
    found = _value(loss, inputs)
    if value is not None:
        wanted = float(value(inputs[0].shape[1]) if callable(value) else value)
    else:
        wanted = float((formula or FORMULAS[check.kind])(*inputs))
    if check.differs(found, wanted, "") is None:
        return None
    usual = "formula" if _views is check.invariant.draw else "value"
    hint = _of_c2bin(check, usual) if value is None and formula is None else ""
    return f"{_text(found)}, expected {_text(wanted)}{hint}"


VALUE = {"value": None, "formula": None, **CLOSE}
for _name, _kinds, _holds, _what, _draw, _fields in (
    (
        *(
            "value_at_agreement",
            ALL[1:],
            "L(y, y) = value for balanced one-hot y; L(α z, z) = value",
        ),
        "hard balanced clusters, alike: log(1 + (K−1)e^(−1/τ)); parallel embeddings: 0",
        *(_agreeing, {"embeddings": PLAIN, "options": {"rows_per_cluster": None, **VALUE}}),
    ),
    (
        *("value_at_disagreement", ALL[1:2], "L(y, y with clusters in a cycle) = value"),
        "hard balanced clusters, those of one view in a cycle: log(K − 1 + e^(1/τ))",
        *(_disagreeing, {"options": {"rows_per_cluster": None, **VALUE}}),
    ),
    (
        *("value_at_orthogonal", ALL[2:], "L(p, z) = value where p ⊥ z"),
        *("orthogonal embeddings: 1", _at_angle, {"least": (1, 2), "most": (6, 6)}),
    ),
    (
        *("value_at_opposite", ALL[2:], "L(p, −α p) = value for α > 0"),
        *("opposite embeddings: 2", _at_angle, {"least": (1, 2), "most": (6, 6)}),
    ),
    (
        *("value_at_balance", ALL[:1], "L(balanced one-hot) = value", "hard balanced clusters: 0"),
        *(_balanced, {"options": {"rows_per_cluster": None, **VALUE}}),
    ),
    (
        *("value_at_imbalance", ALL[:1], "L(P) = formula(P) for any shares of clusters"),
        *("clusters with any shares ŝ: log K − H(ŝ)", _views, {"assignments": SOFT}),
    ),
    (
        *("value_at_collapse", ALL[:2], "L(all in one cluster) = value"),
        "A: log K; AA: (log(1 + (K−1)e^(−1/τ)) + (K−1) log K) / K",
        *(_alike, {"assignments": ("collapsed",), "options": {"rows": None, **VALUE}}),
    ),
    (
        *("value_at_uniform", ALL[:2], "L(1/K everywhere) = value", "A: 0; AA: log K", _alike),
        {"assignments": ("uniform",), "options": {"rows": None, **VALUE}},
    ),
    (
        *("value_in_general", ALL[1:], "L(x, y) = formula(x, y)"),
        "any inputs: what the plain formula gives, Eq. 4 or 1",
        *(_views, {"assignments": SOFT, "embeddings": PLAIN}),
    ),
):
    _more: Any = {"options": VALUE, **_fields}
    invariant(_kinds, _holds, name=_name, what=_what, draw=_draw, **_more)(_value_at)


def _with_clusters(check: Check, draw: st.DrawFn) -> Example:
    example = _views(check, draw)
    order = draw(st.permutations(range(example["assignments"].shape[1])))
    part = draw(st.sampled_from((0.5, 1.0, 0.25)))
    return example | {"clusters": tuple(order[:2]), "part_of_gap": part}


@invariant(ALL[:1], "L does not rise when mass moves to a lighter cluster", draw=_with_clusters)
def monotone_entropy(check: Check, loss: Loss, example: Example) -> str | None:
    """evening out the masses of two clusters never raises L"""
    before, (heavier, lighter) = example["assignments"], example["clusters"]
    mass = before.sum(dim=0)
    if mass[heavier] < mass[lighter]:
        heavier, lighter = lighter, heavier
    gap = (mass[heavier] - mass[lighter]) * example["part_of_gap"]
    # The floor is for two empty clusters, between which nothing moves.
    moved = before[:, heavier] * (gap / mass[heavier].clamp_min(1e-300))
    after = before.clone()
    after[:, heavier] -= moved
    after[:, lighter] += moved
    old, new = _value(loss, [before]), _value(loss, [after])
    if check.invariant.name == "monotone_entropy":
        right = new <= old + check.slack(old)
    else:
        right = gap < 1e-3 or (new < old and not _same(new, old))
    where = f"mass {gap:.6g} from column {heavier} to the lighter column {lighter}"
    return None if right else f"moving {where} takes L from {_text(old)} to {_text(new)}"


def _ever_farther(check: Check, draw: st.DrawFn) -> Example:
    if check.kind == "assignment":
        # All of the gap would turn both about.
        return _with_clusters(check, draw) | {"part_of_gap": 0.25}
    if check.kind == "assignment_pair":
        labels, clusters = _labels(check, draw)
        repeats = len(labels) // clusters
        moved = draw(st.integers(0, repeats - 1))
        place = torch.arange(len(labels)) % repeats
        turned = [labels, *((labels + (place < m)) % clusters for m in (moved, moved + 1))]
        views = [_one_hot(x, clusters) for x in turned]
    else:
        # Rows are orthogonal, also to what they turn to: the angle only changes the positives.
        rows = draw(st.integers(2, 4).map(lambda n: max(n, check.looking.min_rows)))
        rows, columns = (rows, 2 * rows) if check.looking.shapes is None else check.shape(draw)
        first = _one_hot(torch.arange(rows) % (columns // 2), columns)
        angles = draw(st.sampled_from(((0, 60), (60, 90), (90, 120), (120, 180))))
        views = [first, *(_turned(first, angle) for angle in angles)]
    first_name, name = check.names
    return dict(zip((first_name, f"nearer {name}", f"farther {name}"), views, strict=True))


@invariant(
    ALL, "L rises where agreement falls, strictly", draw=_ever_farther, options={},
    least=(1, 2), assignments=("ratios",),
)  # fmt: skip
def strictly_monotone(check: Check, loss: Loss, example: Example) -> str | None:
    """L rises with the angle of embeddings and with each row of every cluster that hard views
    disagree about; it falls with mass that moves to a lighter cluster"""
    if check.kind == "assignment":
        return monotone_entropy(check, loss, example)
    first, *turned = example.values()
    old, new = (_value(loss, [first, second]) for second in turned)
    if new > old and not _same(new, old):
        return None
    return f"L is {_text(old)}, and with less agreement {_text(new)}, expected more"


@invariant(ALL, "value and gradient are finite", options={"dtypes": strategies.DTYPES})
def finite(check: Check, loss: Loss, example: Example) -> str | None:
    """one-hot, uniform, collapsed, dead-cluster, near-one-hot, zero, huge, tiny inputs and n = 1"""
    value, gradients = differentiate(loss, check.inputs(example))
    if not torch.isfinite(value).all():
        return f"value {value.item()}"
    for name, gradient in zip(check.names, gradients, strict=True):
        if gradient is not None and not torch.isfinite(gradient).all():
            return f"gradient of `{name}` {show(gradient)}"
    return None


def _inside(check: Check, draw: st.DrawFn) -> Example:
    if check.kind == "embedding_pair":
        return _views(check, draw)
    weights = strategies.matrix(*check.shape(draw), 1, 4)
    views = [torch.tensor(draw(weights), dtype=torch.float64) for _ in check.names]
    return check.named(*(x / x.sum(dim=1, keepdim=True) for x in views))


@invariant(
    ALL, "autograd = finite differences", draw=_inside, embeddings=PLAIN, most=(4, 4),
    options={"of": None, "rtol": 1e-3, "atol": 1e-5},
)  # fmt: skip
def gradient(check: Check, loss: Loss, example: Example) -> str | None:
    """of all inputs but the target, or of those that `of` names; rows keep their sum"""
    inputs = check.inputs(example)
    found = _wrong_gradient(check, loss, inputs)
    # Ties of small integers sit on the kinks of a max or a hinge, where there is no gradient to
    # compare with. A wrong gradient is as wrong a little further on.
    beside = [_moved(check, x, _direction(x, 7 + i), 0.03) for i, x in enumerate(inputs)]
    return found and _wrong_gradient(check, loss, beside) and found


def _wrong_gradient(check: Check, loss: Loss, inputs: list[Tensor]) -> str | None:
    _, gradients = differentiate(loss, inputs)
    usual = check.names[:1] if check.kind == "embedding_pair" else check.names
    for place in map(check.names.index, check.options.of or usual):
        view, slopes, name = inputs[place], gradients[place], check.names[place]
        for direction in (_direction(view, seed) for seed in (0, 1)):
            terms = _moved(check, view, direction, 1) - view
            terms = terms * (0 if slopes is None else slopes)
            slope, scale = terms.sum().item(), terms.abs().sum().item()
            # A loss that computes in float32 needs the second step: the first is in its noise.
            for step in (1e-3, 3e-2):
                ends = (_moved(check, view, direction, step * x) for x in (1, -1, 0.5, -0.5))
                a, b, c, d = (_value(loss, _with(inputs, place, end)) for end in ends)
                wide, narrow = (a - b) / (2 * step), (c - d) / step
                numeric = (4 * narrow - wide) / 3
                size = max(scale, abs(numeric))
                unsure = check.options.atol + check.options.rtol * size + abs(narrow - wide)
                if abs(numeric - slope) <= unsure:
                    break
            else:
                if slopes is None or not slopes.any():
                    return f"no gradient reaches `{name}`, and L changes with it"
                found = f"{_text(slope)} along a direction, by finite differences {_text(numeric)}"
                return f"gradient of `{name}`: {found}"
    return None


@invariant(ALL[2:], "dL/d target = 0", embeddings=PLAIN, options={})
def no_gradient_to_target(check: Check, loss: Loss, example: Example) -> str | None:
    """targets never get a gradient"""
    _, (_, slopes) = differentiate(loss, check.inputs(example))
    # Where the gradient vanishes anyhow, its rounding error would make a poor example.
    if slopes is None or slopes.abs().max() <= 1e-9:
        return None
    return f"gradient of `target` {show(slopes)}"


@invariant(
    ALL, "0-dim, float32 at least, float64 stays", options={"dtypes": strategies.DTYPES},
    assignments=ORDINARY, embeddings=("plain",),
)  # fmt: skip
def dtype(check: Check, loss: Loss, example: Example) -> str | None:
    """L is 0-dim; float64 for float64 inputs, float32 for all others"""
    value, wide = (
        evaluate(loss, check.inputs(example)),
        torch.promote_types(check.dtype, torch.float),
    )
    right = value.ndim == 0 and value.dtype is wide
    return None if right else f"shape {tuple(value.shape)}, {value.dtype}, expected (), {wide}"


@invariant(
    ALL, "L in lower precision = L in float32", assignments=SOFT, embeddings=PLAIN,
    options={"dtypes": strategies.DTYPES[2:], "autocast": True, "rtol": 1e-4, "atol": 1e-4},
)  # fmt: skip
def lower_precision(check: Check, loss: Loss, example: Example) -> str | None:
    """half inputs, and float32 ones under autocast to bfloat16, give what float32 gives"""
    inputs = check.inputs(example)
    wide, how = _value(loss, [x.float() for x in inputs]), f"in {check.dtype}"
    if check.dtype is not torch.float32:
        return check.differs(_value(loss, inputs), wide, how)
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        return check.differs(_value(loss, inputs), wide, "under autocast to bfloat16")


def _sharded(check: Check, draw: st.DrawFn) -> Example:
    example = _views(check, draw)
    return example | {"shards": draw(strategies.shards(len(example[check.names[0]])))}


@invariant(
    ALL, "T(whole) = Σ_r T(shard r)", draw=_sharded, of_losses=False, assignments=ORDINARY,
    embeddings=(*PLAIN, "zero_row"), options={"loss": None, "from_sums": None, **CLOSE},
)  # fmt: skip
def additive_over_shards(check: Check, statistic: Any, example: Example) -> str | None:
    """of a statistic T; with both options, L(P) = from_sums(Σ_r T(P_r)) and gradients agree"""
    inputs, sizes, close = check.inputs(example), example["shards"], check.options
    if (close.loss is None) != (close.from_sums is None):
        raise ValueError("loss, from_sums: expected both or neither")

    def summed(views: Sequence[Tensor], sizes: Sequence[int]) -> Any:
        parts = zip(*(torch.split(x, list(sizes)) for x in views), strict=True)
        found = [statistic(*part) for part in parts]
        if isinstance(found[0], Tensor):
            return sum(found[1:], found[0])
        return tuple(sum(same[1:], same[0]) for same in zip(*found, strict=True))

    def apart(want: Tensor, have: Tensor) -> bool:
        return not torch.allclose(have, want, rtol=close.rtol, atol=close.atol)

    with calling():
        sums = [summed([x.clone() for x in inputs], s) for s in ([len(inputs[0])], sizes)]
    for want, have in zip(*([x] if isinstance(x, Tensor) else x for x in sums), strict=True):
        if apart(want, have):
            return f"sum over shards {show(have)}, whole {show(want)}"
    if close.loss is None:
        return None
    value, slopes = differentiate(close.loss, inputs)
    again, others = differentiate(lambda *views: close.from_sums(summed(views, sizes)), inputs)
    if found := check.differs(again.item(), value.item(), "from sums over shards"):
        return found
    for name, tensor, *both in zip(check.names, inputs, slopes, others, strict=True):
        want, have = (torch.zeros_like(tensor) if x is None else x for x in both)
        if apart(want, have):
            return f"gradient of `{name}` from sums {show(have)}, whole {show(want)}"
    return None


def _value(loss: Loss, inputs: Sequence[Tensor]) -> float:
    return evaluate(loss, inputs).item()


def _of_c2bin(check: Check, option: str) -> str:
    if getattr(check.options, option) is not None:
        return ""
    option = f"options={{{check.invariant.name!r}: {{{option!r}: ...}}}}"
    return f" (C2BIN's default; {option} expects another)"


def _text(number: float) -> str:
    return f"{number + 0.0:.9g}"  # adding 0 turns -0 into 0


def _same(new: float, old: float) -> bool:
    return abs(new - old) <= ROUNDING * max(1.0, abs(old))


def _with(inputs: Sequence[Tensor], place: int, view: Tensor) -> list[Tensor]:
    return [*inputs[:place], view, *inputs[place + 1 :]]


def _one_hot(labels: Tensor, clusters: int) -> Tensor:
    return torch.eye(clusters, dtype=torch.float64)[labels]


def _turned(view: Tensor, degrees: float) -> Tensor:
    """Turn rows, whose right half is zero, by an angle; exactly where its cosine or sine is 0."""
    cosine, sine = (round(f(math.radians(degrees)), 15) for f in (math.cos, math.sin))
    return cosine * view + sine * view.roll(view.shape[1] // 2, dims=1)


def _moved(check: Check, view: Tensor, direction: Tensor, step: float) -> Tensor:
    if check.kind == "embedding_pair":
        return view + step * direction
    # As through a softmax: rows still sum to 1.
    return view * (1 + step * (direction - (view * direction).sum(dim=1, keepdim=True)))


def _direction(view: Tensor, seed: int) -> Tensor:
    steps = torch.arange(1, view.numel() + 1, dtype=view.dtype, device=view.device)
    return (steps * (37 + seed)).sin().reshape(view.shape)
