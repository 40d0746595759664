"""The losses as modules: each holds its configuration and makes one call into `functional`.

They have no parameters and no buffers, so that adding one to a model leaves its checkpoints alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from c2bin_ext import _checks, functional
from c2bin_ext.functional import C2BINLossOutput, ClusterLossOutput, Heads

__all__ = [
    "BCAContrastiveLoss",
    "BootstrapAlignmentLoss",
    "C2BINLoss",
    "ClusterEntropyRegularizer",
    "MultiScaleClusterLoss",
]


class _Loss(nn.Module):
    """Options as attributes, read at every call, so that a schedule may set them."""

    # Of which every loss has those that its constructor names.
    cluster_weight: float
    entropy_weight: float
    temperature: float
    similarity: str
    positive_in_denominator: bool
    symmetric: bool
    symmetric_alignment: bool
    reduction: str
    gather_distributed: bool
    validate_args: bool

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        own = {"self", "__class__"}
        options = {name: value for name, value in arguments.items() if name not in own}
        self._names = tuple(options)
        for name, value in _checks.options(**options).items():
            setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        """Return the options by name."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())


class BootstrapAlignmentLoss(_Loss):
    """Cosine distance of predictions from the follower's targets, Eq. 1.

    Formula: `L_align = mean_i (1 - ⟨p_i, sg(z_i)⟩ / (‖p_i‖ ‖z_i‖))`, with `sg` the stop-gradient:
    targets are detached inside.

    Args:
        gather_distributed: average over the instances of all ranks; matters only where ranks hold
            different numbers of instances.
        validate_args: check that all values are finite; waits for the GPU.

    Returns:
        Called with `prediction` (n, d) and `target` (n, d): a 0-dim loss in [0, 2].

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: at the call, shapes or devices that do not fit.

    Examples:
        >>> import torch
        >>> from c2bin_ext import BootstrapAlignmentLoss
        >>> criterion = BootstrapAlignmentLoss()
        >>> criterion(torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0, 0.0]]))
        tensor(2.)

    Source: C2BIN, section 3.2; `functional.bootstrap_alignment_loss`.
    """

    def __init__(self, gather_distributed: bool = False, validate_args: bool = False) -> None:
        super().__init__(locals())

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return functional.bootstrap_alignment_loss(prediction, target, **self.options())


class BCAContrastiveLoss(_Loss):
    """Contrast of batch-wise cluster assignment vectors (BCAs) between two views, Eq. 4.

    Formula: `L_bca = mean_k -log( exp(S_kk) / Σ_{j ∈ D(k)} exp(S_kj) )` with `S = C'ᵀC''/τ`,
    where the columns of C' and C'' are the BCAs of the two views.

    Args:
        temperature: τ > 0.
        similarity: `"cosine"` divides every column by its norm over the batch; `"dot"` is the
            formula as printed.
        positive_in_denominator: whether `D(k)` holds k; the printed indicator leaves it out.
        symmetric: average both directions; otherwise only view 0 to view 1, as printed.
        gather_distributed: contrast the columns of the global batch, over all ranks. The loss and,
            after DDP's averaging, the gradient are those of one process on the whole batch.
        validate_args: check that values are finite and rows sum to 1; waits for the GPU.

    Returns:
        Called with `assignments0` (n, K) and `assignments1` (n, K): a 0-dim loss.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: τ <= 0 or an unknown option; at the call, shapes or devices that do not fit, or
            values < 0 on the CPU (logits).

    Examples:
        >>> import torch
        >>> from c2bin_ext import BCAContrastiveLoss
        >>> criterion = BCAContrastiveLoss(temperature=1.0)
        >>> criterion(torch.eye(4), torch.eye(4))
        tensor(0.7437)

    Source: C2BIN, section 3.3; `functional.bca_contrastive_loss`.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        similarity: str = "cosine",
        positive_in_denominator: bool = True,
        symmetric: bool = True,
        gather_distributed: bool = False,
        validate_args: bool = False,
    ) -> None:
        super().__init__(locals())

    def forward(self, assignments0: Tensor, assignments1: Tensor) -> Tensor:
        return functional.bca_contrastive_loss(assignments0, assignments1, **self.options())


class ClusterEntropyRegularizer(_Loss):
    """How far cluster masses are from balance, to be MINIMISED; Eq. 5.

    Formula: `L_ent = log K - H(ŝ) >= 0` with `s_k = Σ_i P[i, k]` and `ŝ = s / Σ s`. It is 0 when
    clusters are balanced and log K when one holds everything; its gradient is that of -H.

    Args:
        reduction: `"mean"` takes the entropy of the shares ŝ; `"sum"` multiplies by the number of
            instances n, as the raw masses of the printed formula do.
        gather_distributed: balance clusters over the global batch of all ranks.
        validate_args: check that values are finite and rows sum to 1; waits for the GPU.

    Returns:
        Called with `assignments` (n, K): a 0-dim loss.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown reduction; at the call, shapes that do not fit, or values < 0 on the
            CPU (logits).

    Examples:
        >>> import torch
        >>> from c2bin_ext import ClusterEntropyRegularizer
        >>> ClusterEntropyRegularizer()(torch.eye(4)[[0, 0, 0, 0]])
        tensor(1.3863)

    Source: C2BIN, section 3.3; `functional.cluster_entropy_regularizer`.
    """

    def __init__(
        self,
        reduction: str = "mean",
        gather_distributed: bool = False,
        validate_args: bool = False,
    ) -> None:
        super().__init__(locals())

    def forward(self, assignments: Tensor) -> Tensor:
        return functional.cluster_entropy_regularizer(assignments, **self.options())


class MultiScaleClusterLoss(_Loss):
    """The cluster terms of all scales, Eq. 5-6: what one adds to any method with two views.

    Formula: `L_clust = Σ_K (L_bca + λ_ent L_ent)`, summed over the scales K.

    Args:
        entropy_weight: λ_ent >= 0.
        temperature, similarity, positive_in_denominator, symmetric: see `BCAContrastiveLoss`.
        reduction: see `ClusterEntropyRegularizer`.
        gather_distributed: the exact loss, and after DDP's averaging the exact gradient, of the
            global batch over all ranks, with one all-reduce.
        validate_args: check that values are finite and rows sum to 1; waits for the GPU.

    Returns:
        Called with `assignments` (heads of view 0, heads of view 1), each a sequence of (n, K):
        `ClusterLossOutput(loss, contrast, entropy)`, 0-dim tensors. Given `target_assignments`,
        as `assignments` but of the follower's features (the EMA target network's), each view is
        contrasted with the follower's other view, which gets no gradient.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: τ <= 0, λ_ent < 0, an unknown option; at the call, shapes, devices or numbers of
            heads that do not fit, or values < 0 on the CPU (logits).

    Examples:
        >>> import torch
        >>> from c2bin_ext import MultiScaleClusterHead, MultiScaleClusterLoss
        >>> head = MultiScaleClusterHead(in_features=8, num_clusters=(2, 4))
        >>> features0, features1 = torch.randn(2, 16, 8)
        >>> MultiScaleClusterLoss()((head(features0), head(features1))).loss.backward()

    Source: C2BIN, sections 3.3 and 3.4; `functional.multi_scale_cluster_loss`.
    """

    def __init__(
        self,
        entropy_weight: float = 1.0,
        temperature: float = 0.1,
        similarity: str = "cosine",
        positive_in_denominator: bool = True,
        symmetric: bool = True,
        reduction: str = "mean",
        gather_distributed: bool = False,
        validate_args: bool = False,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        assignments: Heads,
        target_assignments: Heads | None = None,
    ) -> ClusterLossOutput:
        return functional.multi_scale_cluster_loss(
            assignments, target_assignments=target_assignments, **self.options()
        )


class C2BINLoss(_Loss):
    """The whole objective of C2BIN, Eq. 5-7, by default in the form that trained best.

    Formula: `L = L_align + λ_clust Σ_K (L_bca + λ_ent L_ent)`, summed over the scales K.

    Args:
        cluster_weight: λ_clust >= 0.
        entropy_weight: λ_ent >= 0.
        temperature, similarity, positive_in_denominator, symmetric: see `BCAContrastiveLoss`.
        symmetric_alignment: average the alignment of p0 with z1 and of p1 with z0; otherwise only
            the first, as printed, and p1 and z0 are not read.
        reduction: see `ClusterEntropyRegularizer`.
        gather_distributed: the exact loss, and after DDP's averaging the exact gradient, of the
            global batch over all ranks, with one all-reduce.
        validate_args: check that values are finite and rows of assignments sum to 1; waits for
            the GPU.

    Returns:
        Called with `predictions` (p0, p1), `targets` (z0, z1), each (n, d), and `assignments`
        (heads of view 0, heads of view 1), each a sequence of (n, K):
        `C2BINLossOutput(loss, alignment, contrast, entropy)`, 0-dim tensors. Only `loss` is
        weighted. `target_assignments` is that of `MultiScaleClusterLoss`; `statistics` is for
        micro-batches: see the method of that name.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: τ <= 0, a weight < 0, an unknown option; at the call, shapes, devices or
            numbers of heads that do not fit, or assignments < 0 on the CPU (logits).

    Examples:
        >>> import torch
        >>> from c2bin_ext import C2BINLoss, MultiScaleClusterHead
        >>> head = MultiScaleClusterHead(in_features=8, num_clusters=(2, 4))
        >>> features0, features1 = torch.randn(2, 16, 8)
        >>> predictions, targets = torch.randn(2, 2, 16, 6)
        >>> output = C2BINLoss()(
        ...     predictions=tuple(predictions),
        ...     targets=tuple(targets),
        ...     assignments=(head(features0), head(features1)),
        ... )
        >>> output.loss.shape
        torch.Size([])

    Source: C2BIN, sections 3.3 to 3.5; `functional.c2bin_loss`. The defaults are measured, see
    `docs/explanation/defaults.md`.
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__(locals())

    @classmethod
    def paper(cls, **overrides: Any) -> C2BINLoss:
        """Return the objective with every formula as printed, and the weights of Table 5.

        Formula: Eq. 1 and 4 in one direction, dot products, the positive left out of its own
        denominator, the entropy of the raw masses.

        Args:
            overrides: any argument of `C2BINLoss`, such as the weights and the temperature of
                Table 7 or 10.

        Returns:
            The loss. It trains worse than the default, see `docs/explanation/defaults.md`.

        Raises:
            TypeError: an unknown argument, or one of the wrong type.
            ValueError: as `C2BINLoss`.

        Examples:
            >>> from c2bin_ext import C2BINLoss
            >>> C2BINLoss.paper(temperature=1.0, cluster_weight=1.0).similarity
            'dot'

        Source: C2BIN, Eq. 1-7 and Table 5.
        """
        printed: dict[str, Any] = {
            "cluster_weight": 2.0,
            "temperature": 0.5,
            "similarity": "dot",
            "positive_in_denominator": False,
            "symmetric": False,
            "symmetric_alignment": False,
            "reduction": "sum",
        }
        return cls(**(printed | overrides))

    def forward(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        assignments: Heads,
        target_assignments: Heads | None = None,
        statistics: Tensor | None = None,
    ) -> C2BINLossOutput:
        return functional.c2bin_loss(
            predictions,
            targets,
            assignments,
            target_assignments=target_assignments,
            statistics=statistics,
            **self.options(),
        )

    def statistics(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        assignments: Heads,
        target_assignments: Heads | None = None,
    ) -> Tensor:
        """All sums over instances that the loss needs of a micro-batch, Eq. 1, 4 and 5.

        They add up over the micro-batches of a batch; given the total, the loss of a micro-batch is
        that of the batch, and gradients add up. Arguments are those of the call; the result is
        a vector, without gradient: see `functional.c2bin_statistics`.

        Examples:
            >>> import torch
            >>> from c2bin_ext import C2BINLoss
            >>> criterion, network = C2BINLoss(), torch.nn.Linear(5, 4)
            >>> def outputs(images):
            ...     z, heads = network(images), (network(images).softmax(dim=1),)
            ...     return (z, z), (z, z), (heads, heads)
            >>> micro_batches = torch.randn(3, 8, 5)
            >>> total = sum(criterion.statistics(*outputs(part)) for part in micro_batches)
            >>> for part in micro_batches:
            ...     criterion(*outputs(part), statistics=total).loss.backward()
        """
        return functional.c2bin_statistics(
            predictions,
            targets,
            assignments,
            target_assignments=target_assignments,
            similarity=self.similarity,
            symmetric_alignment=self.symmetric_alignment,
            gather_distributed=self.gather_distributed,
            validate_args=self.validate_args,
        )
