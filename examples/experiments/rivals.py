"""The other methods that cluster: IIC, PICA, Contrastive Clustering and SimCLR with clusters.

They train backbones from scratch. What they share with the others is the backbone, the views and
the optimisation, and not their papers' inputs (Sobel filters), sub-heads and schedules of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from c2bin_lightly import Optimization
from c2bin_lightly.methods import Method
from c2bin_lightly.training import Trained
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn
from typing_extensions import Unpack

from c2bin_ext import MultiScaleClusterHead, MultiScaleClusterLoss
from experiments.cluster_losses import LOSSES, cc


class ClusterMethod(Method):
    """Cluster heads on the backbone, and a loss of their assignments of both views."""

    def __init__(
        self,
        backbone: nn.Module,
        head: MultiScaleClusterHead,
        loss: Callable[[Any], Tensor],
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone, projector or nn.Identity())
        self.cluster_head, self.loss = head, loss

    def step(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        """Return the loss of the two views' clusters under `"loss"`."""
        return self.objective((self(view0), self(view1)))

    def objective(self, features: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return the loss of the clusters of both views' features (n, d)."""
        return {"loss": self.loss(tuple(map(self.cluster_head, features)))}

    def span_processes(self, processes: int) -> None:
        """Leave the loss as it is: its sums are over all processes."""


class ContrastiveMethod(ClusterMethod):
    """The same, plus NT-Xent between the projections of both views."""

    def __init__(self, *parts: Any, temperature: float) -> None:
        super().__init__(*parts)
        self.criterion = NTXentLoss(temperature=temperature)

    def objective(self, features: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return the sum of the losses of instances and clusters, and both."""
        clusters = super().objective(features)["loss"]
        instances = self.criterion(*map(self.projector, features))
        return {"loss": instances + clusters, "instances": instances, "clusters": clusters}

    def span_processes(self, processes: int) -> None:
        """Make instances the negatives of those of all processes."""
        Method.span_processes(self, processes)


class Clustering(Trained):
    """IIC (Ji et al., 2019) and PICA (Huang et al., 2020): linear heads, nothing else.

    Args:
        backbone, feature_dim: As in `SimCLR`.
        loss: Key of `LOSSES`.
        num_clusters: K of each head.
        **optimization: See `Optimization`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        loss: str,
        num_clusters: Sequence[int],
        **optimization: Unpack[Optimization],
    ) -> None:
        super().__init__()
        head = MultiScaleClusterHead(feature_dim, num_clusters)
        self.wrap(ClusterMethod(backbone, head, LOSSES[loss]), optimization)


class ContrastiveClustering(Trained):
    """CC (Li et al., 2021): SimCLR, and a head with a hidden layer whose clusters are contrasted.

    Args:
        backbone, feature_dim, hidden_dim, projection_dim, temperature: As in `SimCLR`.
        num_clusters: K of each head.
        **optimization: See `Optimization`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        num_clusters: Sequence[int],
        hidden_dim: int = 512,
        projection_dim: int = 128,
        temperature: float = 0.5,
        **optimization: Unpack[Optimization],
    ) -> None:
        super().__init__()
        head = MultiScaleClusterHead(feature_dim, num_clusters, hidden_features=feature_dim)
        projector = SimCLRProjectionHead(feature_dim, hidden_dim, projection_dim)
        method = ContrastiveMethod(backbone, head, cc, projector, temperature=temperature)
        self.wrap(method, optimization)


class ClusteredSimCLR(Trained):
    """SimCLR with C2BIN's cluster terms beside it, as any method with two views can have them.

    Args:
        backbone, feature_dim, hidden_dim, projection_dim, temperature: As in `SimCLR`.
        num_clusters: K of each head.
        cluster_weight: Of the cluster terms.
        **optimization: See `Optimization`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        num_clusters: Sequence[int],
        cluster_weight: float,
        hidden_dim: int = 512,
        projection_dim: int = 128,
        temperature: float = 0.5,
        **optimization: Unpack[Optimization],
    ) -> None:
        super().__init__()
        head = MultiScaleClusterHead(feature_dim, num_clusters, normalize=True)
        projector = SimCLRProjectionHead(feature_dim, hidden_dim, projection_dim)
        clusters = MultiScaleClusterLoss(gather_distributed=True)
        method = ContrastiveMethod(
            backbone,
            head,
            lambda views: cluster_weight * clusters(views).loss,
            projector,
            temperature=temperature,
        )
        self.wrap(method, optimization)
