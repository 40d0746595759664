"""The whole of C2BIN beside a network: cluster heads and losses, features in, loss out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from c2bin_ext import _checks
from c2bin_ext.functional import C2BINLossOutput, Heads
from c2bin_ext.heads import MultiScaleClusterHead
from c2bin_ext.losses import C2BINLoss

__all__ = ["C2BINObjective"]


class C2BINObjective(nn.Module):
    """The objective of C2BIN with its cluster heads, Eq. 2-7, in the form that trained best.

    Formula: `L = L_align + λ_clust Σ_K (L_bca + λ_ent L_ent)` of `P_K = softmax(W_K r + b_K)`.

    `head` is a `MultiScaleClusterHead`, whose parameters train with the network, and `loss` a
    `C2BINLoss`; another of either can be put in its place.

    Args:
        in_features: size d of the backbone's features (before any projector).
        num_clusters: K of each head.
        normalize: L2-normalise features for the heads, see `MultiScaleClusterHead`.
        hidden_features: width of a hidden layer of the heads, see `MultiScaleClusterHead`.
        cluster_weight, entropy_weight, temperature, similarity: see `C2BINLoss`.
        positive_in_denominator, symmetric, symmetric_alignment, reduction: see `C2BINLoss`.
        gather_distributed, validate_args: see `C2BINLoss`.
        bias: whether the heads' linear map has a bias.

    Returns:
        Called with `predictions` (p0, p1) of the runner's (the online network's) predictor,
        `targets` (z0, z1) of the follower's (the EMA target network's) projector, each (n, e), and
        `features` (r0, r1) of the runner's backbone, each (n, d):
        `C2BINLossOutput(loss, alignment, contrast, entropy)`. Given `target_features` (f0, f1) of
        the follower's backbone, clusters of a view are contrasted with the follower's of the other
        view, which trains better; without, those of two views of the runner, as printed.
        `statistics` is for micro-batches: see `C2BINLoss.statistics`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range; at the call, shapes or devices that do not fit.

    Examples:
        >>> import torch
        >>> from c2bin_ext import C2BINObjective
        >>> objective = C2BINObjective(in_features=512)
        >>> r0, r1, f0, f1 = torch.randn(4, 256, 512)  # of both backbones
        >>> p0, p1, z0, z1 = torch.randn(4, 256, 128)  # predictions and targets
        >>> output = objective((p0, p1), (z0, z1), (r0, r1), target_features=(f0, f1))
        >>> output.loss.backward()

    Source: C2BIN, sections 3.2 to 3.5. What is not as printed is measured, see
    `docs/explanation/defaults.md`.
    """

    def __init__(
        self,
        in_features: int,
        num_clusters: Sequence[int] = (32, 64, 128),
        normalize: bool = True,
        hidden_features: int | None = None,
        cluster_weight: float = 0.5,
        entropy_weight: float = 1.0,
        temperature: float = 0.1,
        similarity: str = "cosine",
        positive_in_denominator: bool = True,
        symmetric: bool = True,
        symmetric_alignment: bool = True,
        reduction: str = "mean",
        gather_distributed: bool = False,
        validate_args: bool = False,
        bias: bool = True,
    ) -> None:
        given = dict(locals())
        super().__init__()
        self.head = MultiScaleClusterHead(
            in_features, num_clusters, bias, normalize, hidden_features
        )
        own = inspect.signature(MultiScaleClusterHead).parameters.keys() | {"self", "__class__"}
        options = {name: value for name, value in given.items() if name not in own}
        self.loss = C2BINLoss(**options)

    def forward(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        features: Sequence[Tensor],
        target_features: Sequence[Tensor] | None = None,
        statistics: Tensor | None = None,
    ) -> C2BINLossOutput:
        heads, fixed = self._assignments(features, target_features)
        output: C2BINLossOutput = self.loss(
            predictions, targets, heads, target_assignments=fixed, statistics=statistics
        )
        return output

    def statistics(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        features: Sequence[Tensor],
        target_features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """All sums over instances that the objective needs of a micro-batch, Eq. 1, 4 and 5.

        Arguments are those of the call; how to use the result: see `C2BINLoss.statistics`.

        Examples:
            >>> import torch
            >>> from c2bin_ext import C2BINObjective
            >>> objective, views = C2BINObjective(8, (4,)), torch.randn(2, 16, 8)
            >>> objective.statistics(views.unbind(), views.unbind(), views.unbind()).shape
            torch.Size([35])
        """
        with torch.no_grad():
            heads, fixed = self._assignments(features, target_features)
            return self.loss.statistics(predictions, targets, heads, target_assignments=fixed)

    def _assignments(
        self, features: Sequence[Tensor], target_features: Sequence[Tensor] | None
    ) -> tuple[Heads, Heads | None]:
        _checks.pair("features", features, "(r0, r1)")
        heads = [self.head(view) for view in features]
        if target_features is None:
            return heads, None
        _checks.pair("target_features", target_features, "(f0, f1)")
        with torch.no_grad():
            return heads, [self.head(view) for view in target_features]
