"""Plain formulas, and options and skips of usual forms, for `check_invariants(..., preset=...)`.

Presets add up: `infonce(0.1) | full_precision | Preset(min_rows=2)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preset:
    """Invariants to skip, options by invariant and the least n; names of other kinds do nothing."""

    skip: frozenset[str] = frozenset()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    min_rows: int = 1

    def __or__(self, other: Preset) -> Preset:
        names = {**self.options, **other.options}
        options = {n: {**self.options.get(n, {}), **other.options.get(n, {})} for n in names}
        return Preset(self.skip | other.skip, options, max(self.min_rows, other.min_rows))


WIDE = {"dtypes": (torch.float32, torch.float64)}
own_values = Preset(frozenset({"bounds", "follows_formula"}))
full_precision = Preset(frozenset({"lower_precision"}), {"finite": WIDE, "dtype": WIDE})
trains_both = Preset(options={"gradient": {"of": ("prediction", "target")}})


def follows(formula: Callable[..., Tensor | float], lower: Any, upper: Any) -> Preset:
    """Return the preset of a loss with the values of a plain formula of the same inputs."""
    bounds = {"lower": lower, "upper": upper}
    return Preset(options={"follows_formula": {"formula": formula}, "bounds": bounds})


def infonce(temperature: float = 0.5, *, embeddings: bool = False, **options: Any) -> Preset:
    """Return the preset of `contrast`, of clusters or of embeddings that both get gradient."""
    plain: Any = partial(contrast, temperature=temperature, **options)
    skip = set() if options.get("symmetric", True) else {"view_swap"}
    if options.get("similarity") == "dot":
        skip |= {"positive_scaling"}
    formula = (lambda p, z: plain(p.T, z.T)) if embeddings else plain
    preset = follows(formula, -math.inf, math.inf) | Preset(frozenset(skip))
    return preset | trains_both if embeddings else preset


def contrast(
    view0: Tensor,
    view1: Tensor,
    *,
    temperature: float = 0.5,
    similarity: str = "cosine",
    positive_in_denominator: bool = True,
    symmetric: bool = True,
    own_view: bool = False,
) -> Tensor:
    """Return InfoNCE of columns, Eq. 4; `own_view` adds a view's own columns to the negatives."""
    left, right = (_unit(x) if similarity == "cosine" else x.double() for x in (view0, view1))
    itself = torch.eye(left.shape[1], dtype=torch.bool, device=left.device)

    def direction(rows: Tensor, columns: Tensor) -> Tensor:
        logits, own = (rows.T @ x / temperature for x in (columns, rows))
        others = logits if positive_in_denominator else logits.masked_fill(itself, -math.inf)
        if own_view:
            others = torch.cat([others, own.masked_fill(itself, -math.inf)], dim=1)
        return (others.logsumexp(dim=1) - logits.diagonal()).mean()

    forth = direction(left, right)
    return (forth + direction(right, left)) / 2 if symmetric else forth


def alignment(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 1 - the mean cosine of rows, Eq. 1."""
    return 1 - (_unit(prediction.T) * _unit(target.T)).sum(dim=0).mean()


def balance(view: Tensor) -> Tensor:
    """Return log K - H(ŝ), Eq. 5."""
    share = view.double().mean(dim=0)
    return math.log(len(share)) + torch.xlogy(share, share).sum()


def _unit(view: Tensor) -> Tensor:
    return torch.nn.functional.normalize(view.double(), dim=0, eps=1e-300)
