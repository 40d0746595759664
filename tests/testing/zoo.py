"""Broken losses, each with the invariant that catches it, and right ones with what they keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DCLLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from torch import Tensor
from torch.nn.functional import (
    cosine_embedding_loss,
    cosine_similarity,
    cross_entropy,
    dropout,
    kl_div,
    mse_loss,
    normalize,
)

from c2bin_ext import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    ClusterEntropyRegularizer,
)
from c2bin_ext.testing._invariants import REGISTRY
from c2bin_ext.testing.presets import (
    Preset,
    alignment,
    balance,
    contrast,
    follows,
    full_precision,
    infonce,
    own_values,
    trains_both,
)

ONE, PAIR, EMBEDDED = "assignment", "assignment_pair", "embedding_pair"
Loss = Callable[..., Any]
calls = itertools.count()


class Broken(NamedTuple):
    """A loss with one mistake, and the invariant that says so."""

    mistake: str
    kind: Any
    caught_by: str
    loss: Loss


class Right(NamedTuple):
    """A loss without one, how to check it, and what it is not meant to keep."""

    name: str
    kind: Any
    loss: Loss
    how: str
    preset: Preset
    fails: frozenset[str] = frozenset()
    max_examples: int = 10


def wide(view: Tensor) -> Tensor:
    return view.to(torch.promote_types(view.dtype, torch.float32))


def cosines(a: Tensor, b: Tensor, dim: int = 0) -> Tensor:
    """Of columns, or of rows transposed."""
    return normalize(wide(a), dim=dim).T @ normalize(wide(b), dim=dim)


def forth(logits: Tensor, **options: Any) -> Tensor:
    return cross_entropy(logits, torch.arange(len(logits)), **options)


def both(logits: Tensor, **options: Any) -> Tensor:
    return (forth(logits, **options) + forth(logits.T, **options)) / 2


def nce(a: Tensor, b: Tensor) -> Tensor:
    """The contrast, right except under autocast."""
    return both(2 * cosines(a, b))


def hardest(logits: Tensor) -> Tensor:
    others = logits - torch.diag(logits.diagonal() + math.inf)
    return torch.logaddexp(others.amax(1), logits.diagonal()).sub(logits.diagonal()).mean()


def masked(a: Tensor, b: Tensor) -> Tensor:
    alive = (a.sum(0) > 0) & (b.sum(0) > 0)
    return nce(a[:, alive], b[:, alive])


def by_mass(a: Tensor, b: Tensor) -> Tensor:
    return both(2 * cosines(a, b), weight=wide(a + b).sum(0))


def hard(view: Tensor) -> Tensor:
    return torch.eye(view.shape[1], dtype=view.dtype)[view.argmax(1)]


def roots(view: Tensor) -> Tensor:
    return (view / view.sum(0).clamp_min(1e-12)).sqrt()


def share(view: Tensor) -> Tensor:
    return wide(view).mean(0)


def entropy(shares: Tensor) -> Tensor:
    return -(shares * (shares + 1e-36).log()).sum(-1)


def gap(view: Tensor) -> Tensor:
    """The regularizer, right."""
    return math.log(view.shape[1]) - entropy(share(view))


def cosine(p: Tensor, z: Tensor) -> Tensor:
    return cosine_similarity(wide(p), wide(z).detach())


def align(p: Tensor, z: Tensor) -> Tensor:
    """The alignment, right except for extreme lengths."""
    return 1 - cosine(p, z).mean()


def halved(value: Tensor) -> Tensor:
    return value / 2 + value.detach() / 2


def unsafe(view: Tensor, dim: int) -> Tensor:
    return wide(view) / wide(view).norm(dim=dim, keepdim=True)


def raising(a: Tensor, b: Tensor) -> Tensor:
    if len(a) == 1:
        raise RuntimeError("expected more than one instance")
    return nce(a, b)


BROKEN = [
    # --- of two views' assignments ---
    Broken("a constant", PAIR, "every_input_matters", lambda a, b: 0 * nce(a, b) + 1),
    Broken("view 1 is ignored", PAIR, "every_input_matters", lambda a, b: nce(a, a)),
    Broken(
        "each view is contrasted with itself",
        *(PAIR, "every_input_matters", lambda a, b: (nce(a, a) + nce(b, b)) / 2),
    ),
    Broken(
        "only the masses of both views are compared",
        *(PAIR, "every_input_matters", lambda a, b: mse_loss(a.mean(0), b.mean(0))),
    ),
    Broken(
        "view 1 as hard labels",
        *(PAIR, "every_input_matters", lambda a, b: nce(a, hard(b))),
    ),
    Broken("no negatives", PAIR, "follows_formula", lambda a, b: 1 - cosines(a, b).diag().mean()),
    Broken(
        "only the hardest negative",
        *(PAIR, "follows_formula", lambda a, b: hardest(2 * cosines(a, b))),
    ),
    Broken(
        "negatives of a view's own, too",
        *(PAIR, "follows_formula", lambda a, b: contrast(a, b, own_view=True)),
    ),
    Broken(
        "the positive is left out",
        *(PAIR, "bounds", lambda a, b: contrast(a, b, positive_in_denominator=False)),
    ),
    Broken(
        "positives are off by one cluster",
        *(PAIR, "follows_formula", lambda a, b: nce(a, b.roll(1, 1))),
    ),
    Broken("the sign is flipped", PAIR, "strictly_monotone", lambda a, b: -nce(a, b)),
    Broken("half of it", PAIR, "follows_formula", lambda a, b: nce(a, b) / 2),
    Broken(
        "clamped at chance",
        *(PAIR, "strictly_monotone", lambda a, b: nce(a, b).clamp_max(math.log(a.shape[1]))),
    ),
    Broken(
        "a sum over clusters",
        *(PAIR, "follows_formula", lambda a, b: nce(a, b) * a.shape[1]),
    ),
    Broken("a sum over instances", PAIR, "follows_formula", lambda a, b: nce(a, b) * len(a)),
    Broken(
        "the temperature is forgotten", PAIR, "follows_formula", lambda a, b: both(cosines(a, b))
    ),
    Broken(
        "multiplied by the temperature",
        *(PAIR, "follows_formula", lambda a, b: both(cosines(a, b) * 0.5)),
    ),
    Broken(
        "similarities are squared",
        *(PAIR, "follows_formula", lambda a, b: both(2 * cosines(a, b).square())),
    ),
    Broken(
        "roots of shares in place of cosines",
        PAIR,
        "follows_formula",
        lambda a, b: both(2 * roots(a).T @ roots(b)),
    ),
    Broken(
        "smoothed labels",
        *(PAIR, "follows_formula", lambda a, b: both(2 * cosines(a, b), label_smoothing=0.1)),
    ),
    Broken(
        "rows are normalised",
        PAIR,
        "positive_scaling",
        lambda a, b: both(2 * normalize(a).T @ normalize(b)),
    ),
    Broken(
        "one view is normalised",
        PAIR,
        "positive_scaling",
        lambda a, b: both(2 * normalize(a, dim=0).T @ b),
    ),
    Broken(
        "instances are contrasted",
        *(PAIR, "follows_formula", lambda a, b: both(2 * cosines(a.T, b.T))),
    ),
    Broken("one direction", PAIR, "view_swap", lambda a, b: forth(2 * cosines(a, b))),
    Broken(
        "the first instance is ignored",
        PAIR,
        "instance_permutation",
        lambda a, b: nce(a[len(a) > 1 :], b[len(a) > 1 :]),
    ),
    Broken(
        "the last cluster is ignored",
        PAIR,
        "cluster_relabelling",
        lambda a, b: nce(a[:, :-1], b[:, :-1]),
    ),
    Broken(
        "clusters weigh as much as their number",
        PAIR,
        "cluster_relabelling",
        lambda a, b: both(2 * cosines(a, b), weight=torch.arange(1.0, a.shape[1] + 1).to(wide(a))),
    ),
    Broken("clusters weigh as much as their mass", PAIR, "follows_formula", by_mass),
    Broken("empty clusters are left out", PAIR, "follows_formula", masked),
    Broken("a view is detached", PAIR, "gradient", lambda a, b: nce(a, b.detach())),
    Broken("everything is detached", PAIR, "gradient", lambda a, b: nce(a, b).detach()),
    Broken("the gradient is halved", PAIR, "gradient", lambda a, b: halved(nce(a, b))),
    Broken(
        "the similarity's scale has no gradient",
        PAIR,
        "gradient",
        lambda a, b: both(2 * (a / a.detach().norm(dim=0)).T @ (b / b.norm(dim=0))),
    ),
    Broken(
        "an empty column divides 0 by 0",
        PAIR,
        "finite",
        lambda a, b: both(2 * unsafe(a, 0).T @ unsafe(b, 0)),
    ),
    Broken(
        "bfloat16 inside for half inputs",
        PAIR,
        "lower_precision",
        lambda a, b: nce(a, b.bfloat16()) if a.dtype is torch.float16 else nce(a, b),
    ),
    Broken("products under autocast", PAIR, "lower_precision", nce),
    Broken("float64 for everything", PAIR, "dtype", lambda a, b: nce(a, b).double()),
    Broken("one number in a row", PAIR, "dtype", lambda a, b: nce(a, b)[None]),
    Broken("a Python float", PAIR, "dtype", lambda a, b: nce(a, b).item()),
    Broken("an integer tensor", PAIR, "gradient", lambda a, b: nce(a, b).long()),
    Broken(
        "one number for each instance",
        PAIR,
        "instance_permutation",
        lambda a, b: cosine_similarity(a, b),
    ),
    Broken("raises at n = 1", PAIR, "finite", raising),
    Broken("random", PAIR, "instance_permutation", lambda a, b: nce(dropout(a), b)),
    Broken(
        "grows from call to call", PAIR, "view_swap", lambda a, b: nce(a, b) + 1e-3 * next(calls)
    ),
    # --- of one view's assignments ---
    Broken("zero", ONE, "every_input_matters", lambda a: 0 * gap(a)),
    Broken("the sign is flipped", ONE, "strictly_monotone", lambda a: entropy(share(a))),
    Broken("log K is forgotten", ONE, "bounds", lambda a: -entropy(share(a))),
    Broken("half of it", ONE, "follows_formula", lambda a: gap(a) / 2),
    Broken("logarithms to the base 2", ONE, "follows_formula", lambda a: gap(a) / math.log(2)),
    Broken("a sum over instances", ONE, "follows_formula", lambda a: gap(a) * len(a)),
    Broken(
        "squared masses",
        ONE,
        "follows_formula",
        lambda a: (a.shape[1] * share(a).square().sum()).log(),
    ),
    Broken(
        "squared masses between the same ends",
        ONE,
        "follows_formula",
        lambda a: (
            math.log(a.shape[1]) * (a.shape[1] * share(a).square().sum() - 1) / (a.shape[1] - 1)
        ),
    ),
    Broken(
        "the largest share", ONE, "strictly_monotone", lambda a: (a.shape[1] * share(a).max()).log()
    ),
    Broken(
        "the smallest share",
        ONE,
        "strictly_monotone",
        lambda a: math.log(a.shape[1]) * (1 - a.shape[1] * share(a).min()),
    ),
    Broken(
        "the divergence the other way",
        ONE,
        "follows_formula",
        lambda a: -(a.shape[1] * share(a) + 1e-36).log().mean(),
    ),
    Broken(
        "entropy of rows",
        ONE,
        "follows_formula",
        lambda a: math.log(a.shape[1]) - entropy(wide(a)).mean(),
    ),
    Broken(
        "entropy of rows is added",
        ONE,
        "follows_formula",
        lambda a: gap(a) + entropy(wide(a)).mean(),
    ),
    Broken("hard labels", ONE, "every_input_matters", lambda a: gap(hard(a)) + 0 * a.sum()),
    Broken("free below a margin", ONE, "strictly_monotone", lambda a: (gap(a) - 0.1).clamp_min(0)),
    Broken(
        "the first instance counts twice",
        ONE,
        "instance_permutation",
        lambda a: gap(torch.cat([a, a[:1]])),
    ),
    Broken(
        "the last cluster is ignored",
        ONE,
        "cluster_relabelling",
        lambda a: math.log(a.shape[1]) - entropy(share(a)[:-1]),
    ),
    Broken(
        "the logarithm is detached",
        ONE,
        "gradient",
        lambda a: (
            math.log(a.shape[1])
            + (share(a) * (share(a) + 1e-36).log().detach()).sum() / 2
            + (share(a).detach() * (share(a) + 1e-36).log()).sum() / 2
        ),
    ),
    Broken(
        "log 0 of an empty cluster",
        ONE,
        "finite",
        lambda a: (share(a) * (a.shape[1] * share(a)).log()).sum(),
    ),
    Broken(
        "shares in the inputs' dtype",
        ONE,
        "lower_precision",
        lambda a: math.log(a.shape[1]) - entropy(wide(a.mean(0)) ** 1.001),
    ),
    # --- of a prediction and its target ---
    Broken("a constant", EMBEDDED, "every_input_matters", lambda p, z: 0 * align(p, z) + 1),
    Broken(
        "opposite is as good as alike",
        EMBEDDED,
        "follows_formula",
        lambda p, z: 1 - cosine(p, z).abs().mean(),
    ),
    Broken(
        "squared cosines",
        EMBEDDED,
        "follows_formula",
        lambda p, z: 1 - cosine(p, z).square().mean(),
    ),
    Broken(
        "cubed cosines", EMBEDDED, "follows_formula", lambda p, z: 1 - (cosine(p, z) ** 3).mean()
    ),
    Broken(
        "angles in place of cosines",
        EMBEDDED,
        "follows_formula",
        lambda p, z: 2 / math.pi * cosine(p, z).clamp(-1, 1).acos().mean(),
    ),
    Broken("half of it", EMBEDDED, "follows_formula", lambda p, z: align(p, z) / 2),
    Broken(
        "the sign is flipped", EMBEDDED, "strictly_monotone", lambda p, z: 1 + cosine(p, z).mean()
    ),
    Broken(
        "clamped at orthogonal",
        EMBEDDED,
        "strictly_monotone",
        lambda p, z: (1 - cosine(p, z)).clamp_max(1).mean(),
    ),
    Broken("a sum over rows", EMBEDDED, "follows_formula", lambda p, z: (1 - cosine(p, z)).sum()),
    Broken(
        "only the worst row",
        EMBEDDED,
        "every_input_matters",
        lambda p, z: (1 - cosine(p, z)).amax(),
    ),
    Broken(
        "root mean square of rows",
        EMBEDDED,
        "follows_formula",
        lambda p, z: (1 - cosine(p, z)).square().mean().sqrt(),
    ),
    Broken(
        "one cosine of the whole batch",
        EMBEDDED,
        "positive_scaling",
        lambda p, z: align(p.reshape(1, -1), z.reshape(1, -1)),
    ),
    Broken("only the first row", EMBEDDED, "every_input_matters", lambda p, z: align(p[:1], z[:1])),
    Broken(
        "rows weigh as much as their number",
        EMBEDDED,
        "instance_permutation",
        lambda p, z: ((1 - cosine(p, z)) * torch.arange(len(p))).sum() / len(p),
    ),
    Broken(
        "the first coordinate is ignored",
        EMBEDDED,
        "every_input_matters",
        lambda p, z: align(p[:, p.shape[1] > 1 :], z[:, p.shape[1] > 1 :]),
    ),
    Broken("signs of the target", EMBEDDED, "every_input_matters", lambda p, z: align(p, z.sign())),
    Broken(
        "means of both views",
        EMBEDDED,
        "every_input_matters",
        lambda p, z: align(normalize(p).mean(0)[None], normalize(z).mean(0)[None]),
    ),
    Broken(
        "each row with the target of the next",
        EMBEDDED,
        "follows_formula",
        lambda p, z: align(p, z.roll(1, 0)),
    ),
    Broken(
        "nothing is normalised", EMBEDDED, "positive_scaling", lambda p, z: mse_loss(p, z.detach())
    ),
    Broken(
        "the target is not normalised",
        EMBEDDED,
        "positive_scaling",
        lambda p, z: 1 - (normalize(p) * z.detach()).sum(1).mean(),
    ),
    Broken(
        "a large epsilon",
        EMBEDDED,
        "positive_scaling",
        lambda p, z: 1 - cosine_similarity(p, z.detach(), eps=0.1).mean() - 0.01 / p.norm(),
    ),
    Broken(
        "columns are normalised",
        EMBEDDED,
        "positive_scaling",
        lambda p, z: 1 - (normalize(p, dim=0) * normalize(z, dim=0)).sum() / len(p),
    ),
    Broken(
        "a gradient to the target",
        EMBEDDED,
        "gradient",
        lambda p, z: 1 - cosine_similarity(wide(p), wide(z)).mean(),
    ),
    Broken(
        "the prediction is detached",
        EMBEDDED,
        "gradient",
        lambda p, z: 1 - cosine_similarity(p.detach(), z).mean(),
    ),
    Broken(
        "zero vectors divide 0 by 0",
        EMBEDDED,
        "finite",
        lambda p, z: 1 - (unsafe(p, 1) * unsafe(z, 1).detach()).sum(1).mean(),
    ),
    Broken(
        "a root with infinite slope",
        EMBEDDED,
        "finite",
        lambda p, z: (2 * align(p, z).clamp_min(0)).sqrt(),
    ),
    Broken(
        "the inputs' dtype",
        EMBEDDED,
        "dtype",
        lambda p, z: 1 - cosine_similarity(p, z.detach()).mean(),
    ),
    Broken(
        "half precision inside",
        EMBEDDED,
        "lower_precision",
        lambda p, z: (
            align(normalize(p), normalize(z))
            + (normalize(p).sum() - wide(normalize(wide(p))).sum())
        ),
    ),
]

swav = SwaVLoss()


def swapped_prediction(a: Tensor, b: Tensor) -> Tensor:
    return swav([a, b], [])


def heads_of_two(a: Tensor, b: Tensor) -> Tensor:
    """The cluster terms of the whole objective for two equal heads; the alignment is 0."""
    same = torch.ones(len(a), 2, dtype=a.dtype)
    weights = {"cluster_weight": 0.5, "entropy_weight": 1.0, "temperature": 0.5}
    return C2BINLoss(**weights)((same, same), (same, same), ((a, a), (b, b))).loss


def two_heads(a: Tensor, b: Tensor) -> Tensor:
    return contrast(a, b) + (balance(a) + balance(b)) / 2


def minus_cosine(p: Tensor, z: Tensor) -> Tensor:
    return alignment(p, z) - 1


def twice(p: Tensor, z: Tensor) -> Tensor:
    return 2 * alignment(p, z)


def sum_of_gaps(view: Tensor) -> Tensor:
    return len(view) * balance(view)


def in_float32(p: Tensor, z: Tensor) -> Tensor:
    return 1 - cosine_similarity(p.float(), z.detach().float()).mean()


def normalised_mse(p: Tensor, z: Tensor) -> Tensor:
    return mse_loss(normalize(p), normalize(z.detach()), reduction="sum") / len(p)


def embedding_loss(p: Tensor, z: Tensor) -> Tensor:
    return cosine_embedding_loss(p, z.detach(), torch.ones(len(p)))


def divergence(view: Tensor) -> Tensor:
    uniform = torch.full_like(view[0], 1 / view.shape[1])
    return kl_div((uniform + 1e-12).log(), view.mean(0), reduction="sum")


HALF = frozenset({"dtype", "finite", "lower_precision"})
STANDARD = own_values | full_precision | trains_both | Preset(min_rows=4)
RIGHT = [
    Right("BCAContrastiveLoss()", PAIR, BCAContrastiveLoss(), "", Preset()),
    Right(
        'BCAContrastiveLoss(similarity="dot")',
        *(PAIR, BCAContrastiveLoss(similarity="dot")),
        *('infonce(similarity="dot")', infonce(similarity="dot")),
    ),
    Right(
        "BCAContrastiveLoss(positive_in_denominator=False)",
        *(PAIR, BCAContrastiveLoss(positive_in_denominator=False)),
        *("infonce(positive_in_denominator=False)", infonce(positive_in_denominator=False)),
    ),
    Right(
        "BCAContrastiveLoss(0.1, symmetric=False)",
        *(PAIR, BCAContrastiveLoss(0.1, symmetric=False)),
        *("infonce(0.1, symmetric=False)", infonce(0.1, symmetric=False)),
    ),
    Right(
        "cluster terms of C2BINLoss, two heads",
        *(PAIR, heads_of_two, "follows(...), positive_scaling is skipped"),
        follows(two_heads, 0, math.inf) | Preset(frozenset({"positive_scaling"})),
    ),
    Right("ClusterEntropyRegularizer()", ONE, ClusterEntropyRegularizer(), "", Preset()),
    Right(
        'ClusterEntropyRegularizer("sum")',
        *(ONE, ClusterEntropyRegularizer("sum"), "follows(n times the mean)"),
        follows(sum_of_gaps, 0, math.inf),
    ),
    Right("BootstrapAlignmentLoss()", EMBEDDED, BootstrapAlignmentLoss(), "", Preset()),
    Right(
        "lightly NTXentLoss, on columns",
        *(PAIR, lambda a, b: NTXentLoss()(a.T, b.T), "infonce(own_view=True)"),
        *(infonce(own_view=True), HALF),
    ),
    Right(
        "lightly NTXentLoss",
        *(
            EMBEDDED,
            NTXentLoss(0.1),
            "infonce(0.1, own_view=True, embeddings=True) | full_precision",
        ),
        infonce(0.1, own_view=True, embeddings=True) | full_precision,
    ),
    Right(
        "lightly DCLLoss",
        EMBEDDED,
        DCLLoss(0.5),
        "infonce(positive_in_denominator=False, own_view=True, embeddings=True) | full_precision "
        "| Preset(min_rows=2)",
        infonce(positive_in_denominator=False, own_view=True, embeddings=True)
        | full_precision
        | Preset(min_rows=2),
    ),
    Right(
        "lightly BarlowTwinsLoss",
        *(
            EMBEDDED,
            BarlowTwinsLoss(),
            "own_values | full_precision | trains_both | Preset(min_rows=4)",
        ),
        STANDARD,
        frozenset({"positive_scaling", "strictly_monotone", "finite"}),
        50,  # equal rows of 1e30, whose variance overflows, are seldom drawn
    ),
    Right(
        "lightly VICRegLoss",
        *(EMBEDDED, VICRegLoss(), "own_values | full_precision | trains_both | Preset(min_rows=4)"),
        STANDARD,
        frozenset({"positive_scaling", "finite"}),
    ),
    Right(
        "lightly NegativeCosineSimilarity",
        *(
            EMBEDDED,
            NegativeCosineSimilarity(),
            "follows(minus the cosine) | full_precision | trains_both",
        ),
        follows(minus_cosine, -1, 1) | full_precision | trains_both,
    ),
    Right(
        "lightly SwaVLoss, on assignments",
        *(PAIR, swapped_prediction, "own_values | full_precision"),
        own_values | full_precision,
        frozenset({"positive_scaling", "gradient", "dtype"}),
    ),
    Right(
        "torch cosine_similarity in float32",
        EMBEDDED,
        in_float32,
        "",
        Preset(),
        frozenset({"dtype", "finite"}),
    ),
    Right(
        "torch mse_loss, normalised",
        EMBEDDED,
        normalised_mse,
        "follows(twice Eq. 1) | full_precision",
        follows(twice, 0, 4) | full_precision,
    ),
    Right(
        "torch cosine_embedding_loss",
        EMBEDDED,
        embedding_loss,
        "full_precision",
        full_precision,
        frozenset({"finite"}),
    ),
    Right(
        "torch cross_entropy of cosines",
        PAIR,
        nce,
        "",
        Preset(),
        frozenset({"lower_precision", "finite"}),
    ),
    Right(
        "torch kl_div from uniform",
        ONE,
        divergence,
        "full_precision",
        full_precision,
        frozenset({"finite"}),
    ),
]


SHORT = {ONE: "A", PAIR: "AA", EMBEDDED: "EE"}


def table_of_invariants() -> str:
    """What the docs show."""
    lines = ["| name | formula | what holds | kinds | options |", "| --- " * 5 + "|"]
    for name, invariant in REGISTRY.items():
        kinds = ", ".join(SHORT[kind] for kind in invariant.kinds)
        options = ", ".join(f"`{o}`" for o in invariant.options if o not in ("rtol", "atol"))
        row = [f"`{name}`", f"`{invariant.holds}`", invariant.what, kinds, options]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def table_of_broken() -> str:
    """What the docs show."""
    lines = ["| mistake | kind | caught by |", "| --- | --- | --- |"]
    lines += [f"| {b.mistake} | {SHORT[b.kind]} | `{b.caught_by}` |" for b in BROKEN]
    return "\n".join(lines)


def table_of_right() -> str:
    """What the docs show."""
    lines = ["| loss | preset | does not keep |", "| --- | --- | --- |"]
    for right in RIGHT:
        how = f"`{right.how}`" if "(" in right.how or "_" in right.how else right.how
        fails = ", ".join(f"`{name}`" for name in sorted(right.fails))
        lines.append(f"| {right.name} | {how} | {fails} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table_of_invariants(), table_of_broken(), table_of_right(), sep="\n\n")
