"""The rows of both tables: what is fitted, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from c2bin_ext import C2BINLoss, MultiScaleClusterLoss
from c2bin_ext.clustering import C2BINClustering
from experiments.cluster_losses import LOSSES
from experiments.features import rivals


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        name: in the table.
        kind: "classical", "loss" or "c2bin".
        views: whether it sees the stored augmented views.
        options: of the estimator.
        seeded: whether it differs from seed to seed.
    """

    name: str
    kind: str = "c2bin"
    views: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    seeded: bool = True

    def build(self, k: int, d: int, seed: int, device: str) -> Any:
        """Return what has `fit` and `predict`."""
        if self.kind == "classical":
            return rivals.classical(self.name, k, d, seed)
        options: dict[str, Any] = {"n_clusters": (k, 4 * k, 16 * k), "random_state": seed}
        options |= {"device": device, **self.options}
        if self.kind == "loss":
            return rivals.OtherLoss(self.name.split(",")[0], **options)
        return FORMS[options.pop("form", "k-means")](**options)


class RandomStart(C2BINClustering):
    """Heads that do not start from k-means."""

    _warm_up = 0


class Still(C2BINClustering):
    """Rows that are not moved as neighbours differ."""

    _jitter = 0.0, 0.0


class OtherForm(C2BINClustering):
    """Another form of the same loss; `loss` are options of `MultiScaleClusterLoss`."""

    def __init__(self, loss: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.loss = loss

    def _criterion(self, entropy_weight: float) -> Callable[[Any], Any]:
        return MultiScaleClusterLoss(entropy_weight, self.temperature, **self.loss)


FORMS = {"k-means": C2BINClustering, "random": RandomStart, "still": Still, "loss": OtherForm}

UNSEEDED = ("agglomerative", "HDBSCAN")


def rows(views: bool) -> list[Method]:
    """Return the methods of the first table."""
    found = [Method(n, "classical", seeded=n not in UNSEEDED) for n in rivals.CLASSICAL]
    for seen in (False, True)[: 1 + views]:
        note = ", with views" if seen else ""
        found += [Method(f"{name}{note}", "loss", seen) for name in LOSSES]
        found.append(Method(f"C2BIN{note}", "c2bin", seen))
    return found


def ablations(k: int, views: bool) -> list[Method]:
    """Return the rows of the second table: one thing changed at a time."""
    changes: dict[str, dict[str, Any]] = {
        "default": {},
        f"one head of {k}": {"n_clusters": (k,)},
        f"three heads of {k}": {"n_clusters": (k, k, k)},
        f"heads of {k}, {2 * k}, {4 * k}": {"n_clusters": (k, 2 * k, 4 * k)},
        f"five heads, {k} to {16 * k}": {"n_clusters": tuple(k * 2**i for i in range(5))},
        "τ 0.1": {"temperature": 0.1},
        "τ 1": {"temperature": 1.0},
        "λ_ent 0.1": {"entropy_weight": 0.1},
        "λ_ent 0.3": {"entropy_weight": 0.3},
        "λ_ent 3": {"entropy_weight": 3.0},
        "no hidden layer": {"hidden_features": None},
        "hidden layer of 1,024": {"hidden_features": 1024},
        "5 neighbours": {"n_neighbors": 5},
        "50 neighbours": {"n_neighbors": 50},
        "30 epochs": {"max_epochs": 30},
        "batch 256": {"batch_size": 256},
        "batch 1,024": {"batch_size": 1024},
        "random start": {"form": "random"},
        "rows not moved": {"form": "still"},
    }
    paper = C2BINLoss.paper()
    printed = {
        name: getattr(paper, name)
        for name in ("similarity", "positive_in_denominator", "symmetric", "reduction")
    }
    forms = {
        "dot products": {"similarity": "dot"},
        "positive left out of its denominator": {"positive_in_denominator": False},
        "contrast in one direction": {"symmetric": False},
    }
    changes |= {name: {"form": "loss", "loss": loss} for name, loss in forms.items()}
    weights = {"temperature": paper.temperature, "entropy_weight": paper.entropy_weight}
    changes["the loss as printed"] = {"form": "loss", "loss": printed, **weights}
    return [Method(name, views=views, options=options) for name, options in changes.items()]
