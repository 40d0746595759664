"""Losses of cluster assignments by others than C2BIN, each summed over heads.

IIC, PICA and CC need of a batch only sums over instances, as C2BIN does: over several processes
these are of the global batch. Every loss takes (heads of view 0, heads of view 1), each a sequence
of assignments (n, K) whose rows sum to 1, and returns a 0-dim tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from c2bin_ext.distributed import sum_over_ranks
from c2bin_ext.functional import cluster_entropy_regularizer, multi_scale_cluster_loss
from c2bin_ext.statistics import BatchStatistics

Heads = Sequence[Tensor]


def _grams(*views: Heads) -> list[Tensor]:
    """Return for every head the Gram matrices (pairs, K, K) of the views' first and second half."""
    own = BatchStatistics.of(views=views, contrast="dot", balance=False)
    total = own.at(sum_over_ranks(own.flat()))
    return [gram for group in total.groups for gram in group.parts()[::3]]


def iic(assignments: tuple[Heads, Heads]) -> Tensor:
    """IIC (Ji et al., ICCV 2019, Eq. 3): minus the mutual information of the views' clusters.

    Formula: `−Σ_kj J_kj log( J_kj / (J_k J_j) )` with `J = (G + Gᵀ) / 2n` and `G = P'ᵀP''`.
    """
    losses = []
    for (gram,) in _grams(*assignments):
        joint = ((gram + gram.T) / (2 * gram.sum())).clamp_min(1e-9)
        independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
        losses.append((joint * (independent.log() - joint.log())).sum())
    return torch.stack(losses).sum()


def pica(assignments: tuple[Heads, Heads]) -> Tensor:
    """PICA (Huang et al., CVPR 2020, Eq. 9): the cosine contrast at τ = 1, balance weighed 2.

    It is C2BIN's cluster loss, one direction of it, whose balance is over both views.
    """
    return multi_scale_cluster_loss(
        assignments, entropy_weight=2.0, temperature=1.0, symmetric=False, gather_distributed=True
    ).loss


def scan(assignments: tuple[Heads, Heads]) -> Tensor:
    """SCAN (Van Gansbeke et al., ECCV 2020, Eq. 2): pairs alike, and entropy weighed 5."""
    losses = []
    for anchors, neighbours in zip(*assignments, strict=True):
        alike = (anchors * neighbours).sum(dim=1).clamp_min(1e-9).log().mean()
        losses.append(5 * cluster_entropy_regularizer(anchors) - alike)
    return torch.stack(losses).sum()


def cc(assignments: tuple[Heads, Heads]) -> Tensor:
    """CC's cluster-level loss (Li et al., AAAI 2021, Eq. 5-7): NT-Xent of 2K columns at τ = 1.

    Formula: `mean_c −log( exp(s(c, c′)) / Σ_{d ≠ c} exp(s(c, d)) ) − H(ŝ′) − H(ŝ″)`, up to a
    constant, over the columns c of both views; c′ is that of the same cluster in the other view and
    s the cosine.
    """
    first, second = assignments
    losses = []
    # Unlike C2BIN's, the columns of one view are each other's negatives too.
    for between, within0, within1 in _grams(first, first, second, second, first, second):
        rows = torch.arange(2 * len(between), device=between.device)
        products = torch.cat(
            [torch.cat([within0, between], dim=1), torch.cat([between.T, within1], dim=1)]
        )
        scale = products.diagonal().clamp_min(1e-24).rsqrt()
        cosines = products * scale[:, None] * scale
        others = cosines.masked_fill(rows[:, None] == rows, -torch.inf)
        losses.append(cross_entropy(others, rows.roll(len(between))))
    losses += [cluster_entropy_regularizer(p, gather_distributed=True) for p in (*first, *second)]
    return torch.stack(losses).sum()


LOSSES: dict[str, Callable[[tuple[Heads, Heads]], Tensor]] = {
    "IIC": iic,
    "PICA": pica,
    "SCAN": scan,
    "CC": cc,
}
