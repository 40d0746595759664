"""Property-test the losses of another library, and a broken one: `python examples/check_a_loss.py`.

Needs `pip install "c2bin-ext[testing,lightly]"`. Two losses of lightly are wrapped in a lambda
each and checked as they are. What a loss was never meant to keep is skipped or given its own
closed form here; whatever then fails is printed with the smallest input that shows it.
"""

from __future__ import annotations

import math

import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from torch import Tensor

from c2bin_ext.testing import check_invariants

torch.set_num_threads(1)
TEMPERATURE = 0.5


def ntxent_of_clusters() -> None:
    """SimCLR's loss on the columns of two assignment matrices, as Contrastive Clustering does.

    Every column is contrasted with all 2K - 1 others, those of its own view included.
    """
    criterion = NTXentLoss(temperature=TEMPERATURE)

    def ntxent(view0: Tensor, view1: Tensor) -> Tensor:
        # Its arguments are rows to contrast: here the clusters.
        return criterion(view0.T, view1.T)

    def agreement(clusters: int) -> float:
        return math.log1p(2 * (clusters - 1) * math.exp(-1 / TEMPERATURE))

    def collapse(clusters: int) -> float:
        empty = (clusters - 1) * math.log(2 * clusters - 1)
        return (agreement(clusters) + empty) / clusters

    def uniform(clusters: int) -> float:
        return math.log(2 * clusters - 1)

    report = check_invariants(
        ntxent,
        "assignment_pair",
        options={
            "bounds": {"lower": agreement, "upper": math.inf},
            "value_at_agreement": {"value": agreement},
            "value_at_collapse": {"value": collapse},
            "value_at_uniform": {"value": uniform},
        },
        raises=False,
    )
    print(f"lightly.loss.NTXentLoss on clusters\n{report}\n")


def negative_cosine() -> None:
    """SimSiam's and BYOL's loss: callers are to detach the target."""
    criterion = NegativeCosineSimilarity()

    def negative_cosine_similarity(prediction: Tensor, target: Tensor) -> Tensor:
        return criterion(prediction, target)

    report = check_invariants(
        negative_cosine_similarity,
        "embedding_pair",
        options={"bounds": {"lower": -1, "upper": 1}, "value_at_agreement": {"value": -1}},
        raises=False,
    )
    print(f"lightly.loss.NegativeCosineSimilarity\n{report}\n")


def broken() -> None:
    """A balance regularizer with two bugs: its sign is flipped, and it takes log 0."""

    def flipped_entropy(assignments: Tensor) -> Tensor:
        wide = torch.promote_types(assignments.dtype, torch.float32)
        share = assignments.to(wide).mean(dim=0)
        return -torch.xlogy(share, share).sum()

    report = check_invariants(flipped_entropy, "assignment", raises=False)
    print(f"A deliberately broken regularizer\n{report}")


if __name__ == "__main__":
    ntxent_of_clusters()
    negative_cosine()
    broken()
