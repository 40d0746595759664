"""The two methods that only the paper's tables need: MoCo, and SimCLR that knows the classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from c2bin_lightly import MoCoV2, SimCLR
from torch import Tensor, nn
from torch.nn.functional import normalize


class MoCo(MoCoV2):
    """MoCo (He et al., 2020): MoCo v2 with a linear projector.

    The views are those of all the others, as section 4.1 of the paper has it.
    """

    def __init__(
        self, backbone: nn.Module, feature_dim: int, *, projection_dim: int = 128, **options: Any
    ) -> None:
        super().__init__(backbone, feature_dim, projection_dim=projection_dim, **options)
        self.projector = nn.Linear(feature_dim, projection_dim)
        self.follower_projector = copy.deepcopy(self.projector).requires_grad_(False)


def contrast_across_classes(
    projections0: Tensor, projections1: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Return NT-Xent without the negatives that share the class (section 3 of the paper).

    `mean_i −log( exp(s(i, i′)/τ) / (exp(s(i, i′)/τ) + Σ_j exp(s(i, j)/τ)) )` over all 2n views i,
    where i′ is the other view of the same image, j runs over the views of images of OTHER classes,
    and s is the cosine.

    Args:
        projections0: First views, (n, d).
        projections1: Second views, (n, d).
        labels: Classes, int (n,).
        temperature: τ.

    Returns:
        The loss, 0-dim.
    """
    n = len(labels)
    views = normalize(torch.cat([projections0, projections1]).float(), dim=1)
    similarity = views @ views.t() / temperature
    twice = labels.repeat(2)
    positive = torch.arange(2 * n, device=labels.device).roll(n)
    kept = twice[:, None] != twice[None, :]
    kept[torch.arange(2 * n), positive] = True
    return nn.functional.cross_entropy(similarity.masked_fill(~kept, -torch.inf), positive)


class OracleSimCLR(SimCLR):
    """SimCLR that pushes no two images of one class apart: labels pick the negatives."""

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Take `((view0, view1), labels)`."""
        (view0, view1), labels = batch[0], batch[1]
        loss = contrast_across_classes(
            self.projector(self(view0)),
            self.projector(self(view1)),
            labels,
            float(self.criterion.temperature),
        )
        self.log_losses({"loss": loss}, len(labels))
        return loss
