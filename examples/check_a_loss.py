"""Property-test two losses of lightly and a broken one: `python examples/check_a_loss.py`.

Needs `pip install "c2bin-ext[testing,lightly]"`. The losses of lightly are checked as they are, by
a preset for the values that they are meant to have; whatever then fails is printed with the
smallest input that shows it.
"""

from __future__ import annotations

import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from torch import Tensor

from c2bin_ext.testing import check_invariants
from c2bin_ext.testing.presets import alignment, follows, infonce

torch.set_num_threads(1)
ntxent_loss = NTXentLoss(temperature=0.5)
negative_cosine_similarity = NegativeCosineSimilarity()


def ntxent_of_clusters(view0: Tensor, view1: Tensor) -> Tensor:
    """SimCLR's loss on the columns of two assignment matrices, as Contrastive Clustering does."""
    loss: Tensor = ntxent_loss(view0.T, view1.T)
    return loss


def flipped_entropy(assignments: Tensor) -> Tensor:
    """A balance regularizer with two bugs: its sign is flipped, and it takes log 0."""
    wide = torch.promote_types(assignments.dtype, torch.float32)
    share = assignments.to(wide).mean(dim=0)
    return -torch.xlogy(share, share).sum()


if __name__ == "__main__":
    # A cluster is contrasted with the others of both views, its own one included.
    preset = infonce(0.5, own_view=True)
    print(check_invariants(ntxent_of_clusters, "assignment_pair", preset=preset, raises=False))
    preset = follows(lambda p, z: alignment(p, z) - 1, -1, 1)
    print(
        check_invariants(negative_cosine_similarity, "embedding_pair", preset=preset, raises=False)
    )
    print(check_invariants(flipped_entropy, "assignment", raises=False))
