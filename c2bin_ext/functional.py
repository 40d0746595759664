"""One pure function per equation of C2BIN: tensors in, tensors out, no state.

| equation | function |
| --- | --- |
| Eq. 1, alignment of instances | `bootstrap_alignment_loss` |
| Eq. 2-3, assignments and their columns | `cluster_assignments` |
| Eq. 4, contrast of batch-wise cluster assignment vectors | `bca_contrastive_loss` |
| Eq. 5, cluster mass and its entropy | `cluster_mass`, `cluster_entropy_regularizer` |
| Eq. 5-6, sum over scales | `multi_scale_cluster_loss` |
| Eq. 7, total objective | `c2bin_loss` |

Eq. 8, the follower's moving average, is `torch.optim.swa_utils.AveragedModel` with
`get_ema_multi_avg_fn(momentum)`, or the host framework's own.

All take half, single or double precision and compute in float32 at least, also under autocast.
With `gather_distributed=True` every statistic that is a sum over instances is summed over ranks,
see `c2bin_ext.distributed`. The source of every equation is "Learning Representations by
Contrasting Clusters While Bootstrapping Instances", submitted to ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softmax

from c2bin_ext import _checks, _formulas
from c2bin_ext._numerics import at_least_float32
from c2bin_ext.distributed import sum_over_ranks, world_size
from c2bin_ext.statistics import BatchStatistics, at_value_of

__all__ = [
    "C2BINLossOutput",
    "ClusterLossOutput",
    "bca_contrastive_loss",
    "bootstrap_alignment_loss",
    "c2bin_loss",
    "c2bin_statistics",
    "cluster_assignments",
    "cluster_entropy_regularizer",
    "cluster_mass",
    "multi_scale_cluster_loss",
]

Heads = Sequence[Sequence[Tensor]]  # of each view, the assignments (n, K) of each head


class ClusterLossOutput(NamedTuple):
    """The cluster loss and its two terms, each a 0-dim tensor; only `loss` is weighted.

    Attributes:
        loss: `contrast + λ_ent entropy`.
        contrast: Eq. 4, summed over scales.
        entropy: `log K - H` of Eq. 5, summed over scales and averaged over the two views.
    """

    loss: Tensor
    contrast: Tensor
    entropy: Tensor


class C2BINLossOutput(NamedTuple):
    """The objective and its three terms, each a 0-dim tensor; only `loss` is weighted.

    Attributes:
        loss: `alignment + λ_clust (contrast + λ_ent entropy)`, what to minimise.
        alignment: Eq. 1, averaged over the directions in use.
        contrast: Eq. 4, summed over scales.
        entropy: `log K - H` of Eq. 5, summed over scales and averaged over the two views.
    """

    loss: Tensor
    alignment: Tensor
    contrast: Tensor
    entropy: Tensor


def bootstrap_alignment_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    gather_distributed: bool = False,
    validate_args: bool = False,
) -> Tensor:
    """Cosine distance of predictions from the follower's targets, Eq. 1.

    Formula: `L_align = mean_i (1 - ⟨p_i, sg(z_i)⟩ / (‖p_i‖ ‖z_i‖))`, with `sg` the stop-gradient.
    A vector whose largest entry is below its dtype's smallest normal number counts as zero: it has
    cosine 0 with everything, and no gradient.

    Args:
        prediction: predictor outputs of the runner for one view, (n, d).
        target: projector outputs of the follower for the other view, (n, d); never gets gradient.
        gather_distributed: average over the instances of all ranks. Matters only where ranks hold
            different numbers of instances: else DDP's averaging gives the same gradient.
        validate_args: check that all values are finite; waits for the GPU.

    Returns:
        A 0-dim loss in [0, 2], float32 (float64 for float64 inputs).

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not (n, d) with n >= 1 and d >= 1, or shapes or devices that differ.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import bootstrap_alignment_loss
        >>> bootstrap_alignment_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.)

    Source: C2BIN, section 3.2, after Grill et al., "Bootstrap your own latent", 2020.
    """
    _check_embeddings(("prediction", prediction), ("target", target), validate_args)
    sums = BatchStatistics.of([(prediction, target)])
    return _formulas.alignment(_total(sums, gather_distributed))


def cluster_assignments(logits: Tensor, num_clusters: Sequence[int]) -> tuple[Tensor, ...]:
    """Soft assignments of every scale from the logits of one fused linear map, Eq. 2-3 and 6.

    Formula: `P = softmax(z)` over the K logits of a head. Row i is the membership of instance i;
    column k is the batch-wise cluster assignment vector `c_k = P[:, k]`.

    Args:
        logits: scores of all heads side by side, (n, ΣK).
        num_clusters: K of each head, in the order of the columns of `logits`.

    Returns:
        A tuple with one (n, K) tensor per head, rows sum to 1, float32 (float64 stays).

    Raises:
        TypeError: `logits` is not a floating-point tensor, `num_clusters` no sequence of ints.
        ValueError: shapes do not fit, or a K < 2.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import cluster_assignments
        >>> fine, coarse = cluster_assignments(torch.zeros(3, 6), (4, 2))
        >>> fine.shape, coarse[0]
        (torch.Size([3, 4]), tensor([0.5000, 0.5000]))

    Source: C2BIN, sections 3.3 and 3.4.
    """
    counts = _checks.cluster_counts(num_clusters)
    _checks.matrix("logits", logits, "(n, ΣK)", min_columns=2)
    if logits.shape[1] != sum(counts):
        raise ValueError(
            f"logits: expected {sum(counts)} columns for num_clusters {counts}, "
            f"got shape {tuple(logits.shape)}"
        )
    (logits,) = at_least_float32(logits)
    return tuple(softmax(part, dim=1) for part in torch.split(logits, list(counts), dim=1))


def bca_contrastive_loss(
    assignments0: Tensor,
    assignments1: Tensor,
    *,
    temperature: float = 0.5,
    similarity: str = "cosine",
    positive_in_denominator: bool = True,
    symmetric: bool = True,
    gather_distributed: bool = False,
    validate_args: bool = False,
) -> Tensor:
    """Contrast of batch-wise cluster assignment vectors (BCAs) between two views, Eq. 4.

    Formula: `L_bca = mean_k -log( exp(S_kk) / Σ_{j ∈ D(k)} exp(S_kj) )` with `S = C'ᵀC''/τ`,
    where the columns of C' and C'' are the BCAs of the two views. `D(k)` is all clusters, or
    all but k.

    Args:
        assignments0: one head's assignments of view 0, (n, K), rows sum to 1.
        assignments1: the same head's assignments of view 1, (n, K).
        temperature: τ > 0.
        similarity: `"cosine"` divides every column by its norm over the batch, so that the scale
            of S does not depend on n; `"dot"` is the formula as printed. A column of norm 1e-12
            or less (6e-5 for float16) counts as zero: cosine 0 with everything, and no gradient.
        positive_in_denominator: whether `D(k)` holds k, as in InfoNCE; the printed indicator
            leaves it out, and the loss is then not bounded below.
        symmetric: average the directions view 0 to view 1 and view 1 to view 0; otherwise only
            the first, as printed.
        gather_distributed: contrast the columns of the global batch, over all ranks.
        validate_args: check that values are finite and rows sum to 1; waits for the GPU.

    Returns:
        A 0-dim loss, float32 (float64 for float64 inputs). It is log K when all columns are
        alike, or log(K - 1) with the positive left out; with `"cosine"` and the positive kept it is
        at least `log(1 + (K - 1) exp(-1/τ))`, reached when columns agree and do not overlap.

    Raises:
        TypeError: not a floating-point tensor, or an option of the wrong type.
        ValueError: not (n, K) with n >= 1 and K >= 2, shapes or devices that differ, values < 0
            on the CPU (logits), τ <= 0, or an unknown option.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import bca_contrastive_loss
        >>> bca_contrastive_loss(torch.eye(4), torch.eye(4), temperature=1.0)
        tensor(0.7437)

    Source: C2BIN, section 3.3.
    """
    options = _contrast(temperature, similarity, positive_in_denominator, symmetric)
    _check_assignments("assignments0", assignments0, validate_args)
    _check_assignments("assignments1", assignments1, validate_args)
    _checks.same_shape("assignments1", assignments1, "assignments0", assignments0)
    views = {"assignments0": assignments0, "assignments1": assignments1}
    _checks.not_logits(views)
    heads = [[view] for view in views.values()]
    closed = options.has_closed_form
    sums = BatchStatistics.of(views=heads, contrast=similarity, balance=False, closed_form=closed)
    total = _total(sums, gather_distributed)
    return _formulas.cluster_terms(total, options)[0]


def cluster_mass(assignments: Tensor) -> Tensor:
    """Mass of each cluster, the sum of its column, Eq. 5.

    Formula: `s_k = Σ_i P[i, k]`.

    Args:
        assignments: one head's assignments, (n, K), rows sum to 1.

    Returns:
        The masses, (K,); they sum to n.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not (n, K) with n >= 1 and K >= 2.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import cluster_mass
        >>> cluster_mass(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([1.5000, 0.5000])

    Source: C2BIN, section 3.3.
    """
    _checks.matrix("assignments", assignments, "(n, K)", min_columns=2)
    (assignments,) = at_least_float32(assignments)
    return assignments.sum(dim=0)


def cluster_entropy_regularizer(
    assignments: Tensor,
    *,
    reduction: str = "mean",
    gather_distributed: bool = False,
    validate_args: bool = False,
) -> Tensor:
    """How far cluster masses are from balance, to be MINIMISED; Eq. 5.

    Formula: `L_ent = log K - H(ŝ) >= 0` with `s_k = Σ_i P[i, k]`, `ŝ = s / Σ s` and
    `H(ŝ) = -Σ_k ŝ_k log ŝ_k`. It is 0 when clusters are balanced and log K when one holds
    everything; its gradient is that of -H, the term that the paper subtracts.

    Args:
        assignments: one head's assignments, (n, K), rows sum to 1.
        reduction: `"mean"` takes the entropy of the shares ŝ; `"sum"` multiplies by the number of
            instances n, which has the gradient of the entropy of the raw masses s, as printed.
        gather_distributed: balance clusters over the global batch of all ranks.
        validate_args: check that values are finite and rows sum to 1; waits for the GPU.

    Returns:
        A 0-dim loss, float32 (float64 for float64 inputs).

    Raises:
        TypeError: not a floating-point tensor, or an option of the wrong type.
        ValueError: not (n, K) with n >= 1 and K >= 2, values < 0 on the CPU (logits), or an
            unknown reduction.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import cluster_entropy_regularizer
        >>> cluster_entropy_regularizer(torch.eye(4))
        tensor(0.)
        >>> cluster_entropy_regularizer(torch.eye(4)[[0, 0, 0, 0]])
        tensor(1.3863)

    Source: C2BIN, section 3.3.
    """
    _checks.options(reduction=reduction)
    _check_assignments("assignments", assignments, validate_args)
    sums = BatchStatistics.of(views=[[assignments]], closed_form=True)
    _checks.not_logits({"assignments": assignments}, sums.mass)
    total = _total(sums, gather_distributed)
    return _reduced(_formulas.cluster_terms(total)[1], total, reduction)


def multi_scale_cluster_loss(
    assignments: Heads,
    *,
    entropy_weight: float = 1.0,
    temperature: float = 0.1,
    similarity: str = "cosine",
    positive_in_denominator: bool = True,
    symmetric: bool = True,
    reduction: str = "mean",
    gather_distributed: bool = False,
    validate_args: bool = False,
    target_assignments: Heads | None = None,
) -> ClusterLossOutput:
    """The cluster terms of all scales, Eq. 5-6: what one adds to any method with two views.

    Formula: `L_clust = Σ_K (L_bca + λ_ent L_ent)`, summed over the scales K. L_bca is
    `bca_contrastive_loss` and L_ent `cluster_entropy_regularizer`, averaged over the two views.

    Args:
        assignments: (heads of view 0, heads of view 1), each a sequence of (n, K) tensors with
            the same K at the same place, such as `MultiScaleClusterHead` returns.
        entropy_weight: λ_ent >= 0.
        temperature, similarity, positive_in_denominator, symmetric: see `bca_contrastive_loss`.
        reduction: see `cluster_entropy_regularizer`.
        gather_distributed: the exact loss, and after DDP's averaging the exact gradient, of the
            global batch, with one all-reduce of O(ΣK²) numbers for all heads together. Local
            batches may differ in size.
        validate_args: check that values are finite and rows sum to 1; waits for the GPU.
        target_assignments: as `assignments`, but of the follower's features (the EMA target
            network's). If given, each view is contrasted with the follower's other view, which is
            detached; L_bca is the mean of both pairs, and L_ent stays that of `assignments`.

    Returns:
        `ClusterLossOutput(loss, contrast, entropy)`; contrast and entropy are summed over scales,
        and neither is weighted.

    Raises:
        TypeError: something is not a floating-point tensor, no pair, or an option of wrong type.
        ValueError: shapes, devices or numbers of heads that do not fit, values < 0 on the CPU
            (logits), an unknown option, τ <= 0, or λ_ent < 0.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import multi_scale_cluster_loss
        >>> heads = (torch.eye(4), torch.eye(2).repeat(2, 1))
        >>> multi_scale_cluster_loss((heads, heads), temperature=1.0)
        ClusterLossOutput(loss=tensor(1.0569), contrast=tensor(1.0569), entropy=tensor(0.))

    Source: C2BIN, sections 3.3 and 3.4.
    """
    _checks.options(entropy_weight=entropy_weight, reduction=reduction)
    options = _contrast(temperature, similarity, positive_in_denominator, symmetric)
    sums = _batch(assignments, target_assignments, options, validate_args)
    total = _total(sums, gather_distributed)
    return _cluster_terms(total, options, entropy_weight, reduction)


def c2bin_loss(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    assignments: Heads,
    *,
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
    target_assignments: Heads | None = None,
    statistics: Tensor | None = None,
) -> C2BINLossOutput:
    """The whole objective of C2BIN, Eq. 5-7.

    Formula: `L = L_align + λ_clust L_clust`. L_align is `bootstrap_alignment_loss`, averaged over
    its directions, and L_clust `multi_scale_cluster_loss`.

    Args:
        predictions: (p0, p1), the runner's predictor outputs of the two views, each (n, d).
        targets: (z0, z1), the follower's projector outputs, each (n, d). p0 is aligned with z1
            and p1 with z0.
        assignments: (heads of view 0, heads of view 1), see `multi_scale_cluster_loss`.
        cluster_weight: λ_clust >= 0.
        entropy_weight: λ_ent >= 0.
        temperature, similarity, positive_in_denominator, symmetric: see `bca_contrastive_loss`.
        symmetric_alignment: average the alignment of p0 with z1 and of p1 with z0; otherwise only
            the first, as printed, and p1 and z0 are not read.
        reduction: see `cluster_entropy_regularizer`.
        gather_distributed: the exact loss and gradient of the global batch of all ranks, with one
            all-reduce for all terms together, see `multi_scale_cluster_loss`.
        validate_args: check that values are finite and rows of assignments sum to 1; waits for
            the GPU.
        target_assignments: contrast with the follower's, see `multi_scale_cluster_loss`.
        statistics: the sum of `c2bin_statistics` over the micro-batches of a batch. The loss is
            then that of the batch, and the gradients of its micro-batches add up to that of the
            batch.

    Returns:
        `C2BINLossOutput(loss, alignment, contrast, entropy)`; contrast and entropy are summed over
        scales, and no weight is applied to the last three.

    Raises:
        TypeError: something is not a floating-point tensor, no pair, or an option of wrong type.
        ValueError: shapes, devices or numbers of heads that do not fit, values < 0 of assignments
            on the CPU (logits), an unknown option, τ <= 0, or a weight < 0.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import c2bin_loss
        >>> embeddings, heads = torch.eye(4), (torch.eye(4), torch.eye(4)[:, :2].softmax(dim=1))
        >>> output = c2bin_loss((embeddings,) * 2, (embeddings,) * 2, (heads, heads))
        >>> output.alignment, output.entropy
        (tensor(0.), tensor(0.))

    Source: C2BIN, sections 3.3 to 3.5.
    """
    weights = {"cluster_weight": cluster_weight, "entropy_weight": entropy_weight}
    _checks.options(**weights, symmetric_alignment=symmetric_alignment, reduction=reduction)
    options = _contrast(temperature, similarity, positive_in_denominator, symmetric)
    aligned = _aligned(predictions, targets, symmetric_alignment, validate_args)
    sums = _batch(assignments, target_assignments, options, validate_args, aligned)
    total = _total(sums, gather_distributed, statistics, validate_args)
    alignment = _formulas.alignment(total)
    clusters = _cluster_terms(total, options, entropy_weight, reduction)
    loss = torch.add(alignment, clusters.loss, alpha=cluster_weight)
    return C2BINLossOutput(loss, alignment, clusters.contrast, clusters.entropy)


def c2bin_statistics(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    assignments: Heads,
    *,
    similarity: str = "cosine",
    symmetric_alignment: bool = True,
    gather_distributed: bool = False,
    validate_args: bool = False,
    target_assignments: Heads | None = None,
) -> Tensor:
    """All sums over instances that `c2bin_loss` needs of a batch, in one vector.

    Formula: `Σ_i cos(p_i, z_i)` of each direction, n, and of each head `C'ᵀC''`, the masses
    `s_k = Σ_i P[i, k]` of both views and, for cosines, `‖c_k‖²`.

    They add up over the parts of a batch: the sum over micro-batches, given to `c2bin_loss` as
    `statistics`, makes loss and gradient of each micro-batch those of the whole batch. No gradient
    is recorded.

    Args:
        predictions, targets, assignments, target_assignments: see `c2bin_loss`.
        similarity, symmetric_alignment, validate_args: see `c2bin_loss`.
        gather_distributed: sum over ranks too, in one all-reduce.

    Returns:
        A vector of as many sums, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `c2bin_loss`.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import c2bin_loss, c2bin_statistics
        >>> def outputs(rows):  # of a network, for some of the rows of a batch
        ...     views = (torch.eye(6)[rows],) * 2
        ...     return views, views, [[view.softmax(dim=1)] for view in views]
        >>> micro_batches = [[0, 1], [2, 3], [4, 5]]
        >>> total = sum(c2bin_statistics(*outputs(rows)) for rows in micro_batches)
        >>> part = c2bin_loss(*outputs(micro_batches[0]), statistics=total)
        >>> torch.allclose(part.loss, c2bin_loss(*outputs([0, 1, 2, 3, 4, 5])).loss)
        True

    Source: C2BIN, Eq. 1, 4 and 5; two passes as in Gao et al., "Scaling deep contrastive learning
    batch size under memory limited setup", 2021, which caches features where sums suffice here.
    """
    _checks.options(symmetric_alignment=symmetric_alignment)
    options = _contrast(1.0, similarity, True, True)
    with torch.no_grad():
        aligned = _aligned(predictions, targets, symmetric_alignment, validate_args)
        sums = _batch(assignments, target_assignments, options, validate_args, aligned)
        return _total(sums, gather_distributed).flat()


def _contrast(
    temperature: Any, similarity: str, positive_in_denominator: bool, symmetric: bool
) -> _formulas.Contrast:
    _checks.options(
        temperature=temperature,
        similarity=similarity,
        positive_in_denominator=positive_in_denominator,
        symmetric=symmetric,
    )
    return _formulas.Contrast(temperature, similarity, positive_in_denominator, symmetric)


def _batch(
    assignments: Heads,
    target_assignments: Heads | None,
    options: _formulas.Contrast,
    validate_args: bool,
    aligned: Sequence[tuple[Tensor, Tensor]] = (),
) -> BatchStatistics:
    """Return the sums over the instances at hand, of heads that are checked here."""
    named, fixed = _check_heads("assignments", assignments, validate_args), {}
    like = ("predictions[0]", aligned[0][0]) if aligned else next(iter(named.items()))
    if target_assignments is not None:
        fixed = _check_heads("target_assignments", target_assignments, validate_args)
        given, wanted = (
            [head.shape[1] for head in heads[0]] for heads in (target_assignments, assignments)
        )
        if given != wanted:
            raise ValueError(
                f"target_assignments: expected heads of {wanted} clusters as assignments has, "
                f"got {given}"
            )
    for name, tensor in [*named.items(), *fixed.items()]:
        _checks.same_rows(name, tensor, *like)
    views = assignments, target_assignments or ()
    closed = options.has_closed_form
    sums = BatchStatistics.of(aligned, *views, contrast=options.similarity, closed_form=closed)
    _checks.not_logits(named, sums.mass)
    _checks.not_logits(fixed)
    return sums


def _total(
    own: BatchStatistics,
    gather_distributed: bool,
    statistics: Tensor | None = None,
    validate_args: bool = False,
) -> BatchStatistics:
    """Return the sums that the loss is taken of: over micro-batches, over ranks, or as they are."""
    _checks.options(gather_distributed=gather_distributed)
    spans_ranks = gather_distributed and world_size() > 1
    if statistics is None:
        return own.at(sum_over_ranks(own.flat()), world_size()) if spans_ranks else own
    flat = own.flat()
    _checks.sums("statistics", statistics, flat)
    if validate_args:
        _checks.validate_finite("statistics", statistics)
    # The W equal losses of the ranks, which DDP averages, as in `sum_over_ranks`.
    scale = world_size() if spans_ranks else 1
    return own.at(at_value_of(flat * scale, statistics), scale)


def _cluster_terms(
    sums: BatchStatistics, options: _formulas.Contrast, entropy_weight: float, reduction: str
) -> ClusterLossOutput:
    contrast, entropy = _formulas.cluster_terms(sums, options)
    entropy = _reduced(entropy, sums, reduction)
    return ClusterLossOutput(torch.add(contrast, entropy, alpha=entropy_weight), contrast, entropy)


def _reduced(entropy: Tensor, sums: BatchStatistics, reduction: str) -> Tensor:
    return entropy * sums.count if reduction == "sum" else entropy


def _check_embeddings(
    prediction: tuple[str, Tensor], target: tuple[str, Tensor], validate_args: bool
) -> None:
    for named in (prediction, target):
        _checks.matrix(*named, "(n, d)")
        if _checks.flag("validate_args", validate_args):
            _checks.validate_finite(*named)
    _checks.same_shape(*target, *prediction)


def _check_assignments(name: str, assignments: Tensor, validate_args: bool) -> None:
    _checks.matrix(name, assignments, "(n, K)", min_columns=2)
    if _checks.flag("validate_args", validate_args):
        _checks.validate_assignments(name, assignments)


def _aligned(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    symmetric_alignment: bool,
    validate_args: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs (prediction, target of the other view) that Eq. 1 compares."""
    _checks.pair("predictions", predictions, "(p0, p1)")
    _checks.pair("targets", targets, "(z0, z1)")
    found = list(zip(predictions, reversed(targets), strict=True))[: 1 + symmetric_alignment]
    for view, (prediction, target) in enumerate(found):
        named = (f"predictions[{view}]", prediction), (f"targets[{1 - view}]", target)
        _check_embeddings(*named, validate_args)
    if symmetric_alignment:
        _checks.same_shape("predictions[1]", predictions[1], "predictions[0]", predictions[0])
    return found


def _check_heads(argument: str, assignments: Heads, validate_args: bool) -> dict[str, Tensor]:
    """Check the assignments of both views, head by head, and return each by its name."""
    _checks.pair(argument, assignments, "(heads of view 0, heads of view 1)")
    for view, heads in enumerate(assignments):
        if isinstance(heads, Tensor) or not isinstance(heads, Sequence):
            raise TypeError(
                f"{argument}[{view}]: expected a sequence of (n, K) tensors, one per head, "
                f"got {type(heads).__name__}"
            )
    if len(assignments[0]) != len(assignments[1]) or not assignments[0]:
        raise ValueError(
            f"{argument}: expected the same number of heads, one at least, for both views, "
            f"got {len(assignments[0])} and {len(assignments[1])}"
        )
    named: dict[str, Tensor] = {}
    for head, views in enumerate(zip(*assignments, strict=True)):
        names = [f"{argument}[{view}][{head}]" for view in range(2)]
        for name, tensor in zip(names, views, strict=True):
            _check_assignments(name, tensor, validate_args)
            named[name] = tensor
        _checks.same_shape(names[1], views[1], names[0], views[0])
    return named
