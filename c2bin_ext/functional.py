"""One pure function per equation of C2BIN: tensors in, tensors out, no state.

| equation | function |
| --- | --- |
| Eq. 1, alignment of instances | `bootstrap_alignment_loss` |
| Eq. 2-3, assignments and their columns | `cluster_assignments` |
| Eq. 4, contrast of batch-wise cluster assignment vectors | `bca_contrastive_loss` |
| Eq. 5, cluster mass and its entropy | `cluster_mass`, `cluster_entropy_regularizer` |
| Eq. 5-7, sum over scales and total objective | `c2bin_loss` |

Eq. 8, the follower's moving average, is `torch.optim.swa_utils.AveragedModel` with
`get_ema_multi_avg_fn(momentum)`, or the host framework's own.

All take half, single or double precision and compute in float32 at least, also under autocast.
With `gather_distributed=True` every statistic that is a sum over instances is summed over ranks,
see `c2bin_ext.distributed`. The source of every equation is "Learning Representations by
Contrasting Clusters While Bootstrapping Instances", submitted to ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softmax

from c2bin_ext import _checks, _fused
from c2bin_ext._numerics import (
    SMALLEST_MASS,
    SMALLEST_RATIO,
    at_least_float32,
    inverse_norm,
    smallest_square,
    unit_rows,
    without_autocast,
)
from c2bin_ext.distributed import sum_over_ranks, world_size
from c2bin_ext.statistics import at_value_of

__all__ = [
    "C2BINLossOutput",
    "bca_contrastive_loss",
    "bootstrap_alignment_loss",
    "c2bin_loss",
    "c2bin_statistics",
    "cluster_assignments",
    "cluster_entropy_regularizer",
    "cluster_mass",
]


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
    _check_embeddings("prediction", prediction, "target", target, validate_args)
    cosines = _cosine_sum(prediction, target)
    count: int | Tensor = prediction.shape[0]
    if _spans_ranks(gather_distributed):
        cosines, count = sum_over_ranks([cosines, cosines.new_full((), prediction.shape[0])])
    return 1 - cosines / count


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
    running: Callable[[Tensor], Tensor] | None = None,
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
        symmetric: average the directions view 0 to view 1 and view 1 to view 0; otherwise the
            first alone, as printed.
        gather_distributed: contrast the columns of the global batch, over all ranks.
        validate_args: check that values are finite and rows sum to 1; waits for the GPU.
        running: maps the sums over instances, in one vector, to those that the loss is taken of:
            see `c2bin_ext.statistics.RunningStatistics`.

    Returns:
        A 0-dim loss, float32 (float64 for float64 inputs). It is log K when all columns are
        alike, or log(K - 1) with the positive left out; with `"cosine"` and the positive kept it is
        at least `log(1 + (K - 1) exp(-1/τ))`, reached when columns agree and do not overlap.

    Raises:
        TypeError: not a floating-point tensor, or an option of the wrong type.
        ValueError: not (n, K) with n >= 1 and K >= 2, shapes or devices that differ, τ <= 0, or
            an unknown option.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import bca_contrastive_loss
        >>> bca_contrastive_loss(torch.eye(4), torch.eye(4), temperature=1.0)
        tensor(0.7437)

    Source: C2BIN, section 3.3.
    """
    options = _contrast_options(temperature, similarity, positive_in_denominator, symmetric)
    _check_assignments("assignments0", assignments0, validate_args)
    _check_assignments("assignments1", assignments1, validate_args)
    _checks.same_shape("assignments1", assignments1, "assignments0", assignments0)
    spans_ranks = _spans_ranks(gather_distributed)
    if not spans_ranks and running is None:
        return _local_contrast(assignments0, assignments1, options)
    sums = _contrast_sums(assignments0, assignments1, options)
    if spans_ranks:
        sums = list(sum_over_ranks(sums))
    return _contrast_from_sums(iter(_smoothed(sums, running)), options)


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
    running: Callable[[Tensor], Tensor] | None = None,
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
        running: maps the masses (K,) to those that the entropy is taken of: see
            `c2bin_ext.statistics.RunningStatistics`.

    Returns:
        A 0-dim loss, float32 (float64 for float64 inputs).

    Raises:
        TypeError: not a floating-point tensor, or an option of the wrong type.
        ValueError: not (n, K) with n >= 1 and K >= 2, or an unknown reduction.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import cluster_entropy_regularizer
        >>> cluster_entropy_regularizer(torch.eye(4))
        tensor(0.)
        >>> cluster_entropy_regularizer(torch.eye(4)[[0, 0, 0, 0]])
        tensor(1.3863)

    Source: C2BIN, section 3.3.
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _check_assignments("assignments", assignments, validate_args)
    mass = cluster_mass(assignments)
    count: int | Tensor = assignments.shape[0]
    if _spans_ranks(gather_distributed):
        rows = mass.new_full((), assignments.shape[0])
        mass, count = sum_over_ranks([mass, rows])
    gap = _balance_gaps([mass if running is None else running(mass)])
    return gap * count if reduction == "sum" else gap


def c2bin_loss(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    assignments: Sequence[Sequence[Tensor]],
    *,
    cluster_weight: float = 2.0,
    entropy_weight: float = 1.0,
    temperature: float = 0.5,
    similarity: str = "cosine",
    positive_in_denominator: bool = True,
    symmetric: bool = True,
    symmetric_alignment: bool = True,
    reduction: str = "mean",
    gather_distributed: bool = False,
    validate_args: bool = False,
    running: Callable[[Tensor], Tensor] | None = None,
    statistics: Tensor | None = None,
    target_assignments: Sequence[Sequence[Tensor]] | None = None,
) -> C2BINLossOutput:
    """The whole objective of C2BIN, Eq. 5-7.

    Formula: `L = L_align + λ_clust Σ_K (L_bca + λ_ent L_ent)`, summed over the scales K. L_align
    is `bootstrap_alignment_loss`, L_bca `bca_contrastive_loss` and L_ent
    `cluster_entropy_regularizer`, averaged over the two views.

    Args:
        predictions: (p0, p1), the runner's predictor outputs of the two views, each (n, d).
        targets: (z0, z1), the follower's projector outputs, each (n, d). p0 is aligned with z1
            and p1 with z0.
        assignments: (heads of view 0, heads of view 1), each a sequence of (n, K) tensors with
            the same K at the same place, such as `MultiScaleClusterHead` returns.
        cluster_weight: λ_clust >= 0.
        entropy_weight: λ_ent >= 0.
        temperature: τ > 0, see `bca_contrastive_loss`.
        similarity: `"cosine"` or `"dot"`, see `bca_contrastive_loss`.
        positive_in_denominator: see `bca_contrastive_loss`.
        symmetric: contrast in both directions, see `bca_contrastive_loss`.
        symmetric_alignment: average the alignment of p0 with z1 and of p1 with z0; otherwise the
            first alone, as printed, and p1 and z0 are not read.
        reduction: `"mean"` or `"sum"`, see `cluster_entropy_regularizer`.
        gather_distributed: the exact loss, and after DDP's averaging the exact gradient, of the
            global batch, with one all-reduce of O(ΣK²) numbers for all terms together. Local
            batches may differ in size.
        validate_args: check that values are finite and rows of assignments sum to 1; waits for
            the GPU.
        running: maps the sums over instances of all cluster terms, in one vector, to those that
            the terms are taken of: see `c2bin_ext.statistics.RunningStatistics`.
        statistics: the sum of `c2bin_statistics` over the micro-batches of a batch. The loss is
            then that of the batch, and the gradients of its micro-batches add up to that of the
            batch.
        target_assignments: as `assignments`, but of the follower's features. If given, each view's
            assignments are contrasted with the follower's of the other view, which are detached,
            and the cluster terms are averaged over the two pairs.

    Returns:
        `C2BINLossOutput(loss, alignment, contrast, entropy)`; contrast and entropy are summed over
        scales, and no weight is applied to the last three.

    Raises:
        TypeError: something is not a floating-point tensor, no pair, or an option of wrong type.
        ValueError: shapes, devices or numbers of heads that do not fit, an unknown option, τ <= 0,
            or a weight < 0.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import c2bin_loss
        >>> embeddings, heads = torch.eye(4), (torch.eye(4), torch.eye(4)[:, :2].softmax(dim=1))
        >>> output = c2bin_loss((embeddings,) * 2, (embeddings,) * 2, (heads, heads))
        >>> output.alignment, output.entropy
        (tensor(0.), tensor(0.))

    Source: C2BIN, sections 3.3 to 3.5.
    """
    cluster_weight = _checks.finite_number("cluster_weight", cluster_weight)
    entropy_weight = _checks.finite_number("entropy_weight", entropy_weight)
    _checks.flag("symmetric_alignment", symmetric_alignment)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    options = _contrast_options(temperature, similarity, positive_in_denominator, symmetric)
    aligned = _check_aligned(predictions, targets, symmetric_alignment, validate_args)
    if target_assignments is not None and running is not None:
        raise ValueError(
            "target_assignments: expected None together with running statistics, which are those "
            "of two views of the runner"
        )
    heads = _contrasted(assignments, target_assignments, aligned[0][0], validate_args)
    ways = 1 if target_assignments is None else 2

    spans_ranks = _spans_ranks(gather_distributed)
    count: int | Tensor = aligned[0][0].shape[0]
    if spans_ranks or running is not None or statistics is not None:
        sums = _objective_sums(aligned, heads, options)
        if statistics is not None:
            sums = _of_the_whole_batch(sums, statistics, running, spans_ranks, validate_args)
        elif spans_ranks:
            sums = list(sum_over_ranks(sums))
        first = len(aligned) + 1  # cosines and count are of this step alone
        sums[first:] = _smoothed(sums[first:], running)
        totals = iter(sums)
        cosines, count = [next(totals) for _ in aligned], next(totals)
        contrasts, masses = [], []
        for _ in heads:
            masses += [next(totals), next(totals)]
            contrasts.append(_contrast_from_sums(totals, options))
    else:
        cosines = [_cosine_sum(prediction, target) for prediction, target in aligned]
        contrasts = [_local_contrast(view0, view1, options) for view0, view1 in heads]
        views = at_least_float32(*(view for pair in heads for view in pair))
        masses = [view.sum(dim=0) for view in views]

    alignment = 1 - reduce(torch.add, cosines) / (count * len(cosines))
    contrast = reduce(torch.add, contrasts)
    contrast = contrast / ways if ways > 1 else contrast
    entropy = _balance_gaps(masses) / (2 * ways)
    if reduction == "sum":
        entropy = entropy * count
    loss = alignment + cluster_weight * (contrast + entropy_weight * entropy)
    return C2BINLossOutput(loss, alignment, contrast, entropy)


def c2bin_statistics(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    assignments: Sequence[Sequence[Tensor]],
    *,
    similarity: str = "cosine",
    symmetric_alignment: bool = True,
    gather_distributed: bool = False,
    validate_args: bool = False,
    target_assignments: Sequence[Sequence[Tensor]] | None = None,
) -> Tensor:
    """All sums over instances that `c2bin_loss` needs of a batch, in one vector.

    Formula: `Σ_i cos(p_i, z_i)` of each direction, n, and of each head the masses
    `s_k = Σ_i P[i, k]` of both views, `C'ᵀC''` and, for cosines, `‖c_k‖²` of both views.

    They add up over the parts of a batch: the sum over micro-batches, given to `c2bin_loss` as
    `statistics`, makes loss and gradient of each micro-batch those of the whole batch. No gradient
    is recorded.

    Args:
        predictions: see `c2bin_loss`.
        targets: see `c2bin_loss`.
        assignments: see `c2bin_loss`.
        similarity: see `c2bin_loss`.
        symmetric_alignment: see `c2bin_loss`.
        gather_distributed: sum over ranks too, in one all-reduce.
        validate_args: see `c2bin_loss`.
        target_assignments: see `c2bin_loss`.

    Returns:
        A vector of as many sums, float32 (float64 for float64 inputs).

    Raises:
        TypeError: as `c2bin_loss`.
        ValueError: as `c2bin_loss`.

    Examples:
        >>> import torch
        >>> from c2bin_ext.functional import c2bin_loss, c2bin_statistics
        >>> def outputs(rows):  # of a network, for some of the rows of a batch
        ...     features = torch.eye(6)[rows]
        ...     heads = (features.softmax(dim=1),)
        ...     return (features, features), (features, features), (heads, heads)
        >>> micro_batches = [[0, 1], [2, 3], [4, 5]]
        >>> total = sum(c2bin_statistics(*outputs(rows)) for rows in micro_batches)
        >>> part = c2bin_loss(*outputs(micro_batches[0]), statistics=total)
        >>> whole = c2bin_loss(*outputs([0, 1, 2, 3, 4, 5]))
        >>> torch.allclose(part.loss, whole.loss)
        True

    Source: C2BIN, Eq. 1, 4 and 5; two passes as in Gao et al., "Scaling deep contrastive learning
    batch size under memory limited setup", 2021, which caches features where sums suffice here.
    """
    options = _contrast_options(1.0, similarity, True, True)
    aligned = _check_aligned(predictions, targets, symmetric_alignment, validate_args)
    heads = _contrasted(assignments, target_assignments, aligned[0][0], validate_args)
    with torch.no_grad():
        sums = _objective_sums(aligned, heads, options)
        if _spans_ranks(gather_distributed):
            sums = list(sum_over_ranks(sums))
        return _flat(sums)


def _objective_sums(
    aligned: list[tuple[Tensor, Tensor]],
    heads: list[tuple[Tensor, Tensor]],
    options: _ContrastOptions,
) -> list[Tensor]:
    """Return cosines of each direction, count, and of each head masses and contrast sums."""
    cosines = [_cosine_sum(prediction, target) for prediction, target in aligned]
    sums = [*cosines, cosines[0].new_full((), heads[0][0].shape[0])]
    for view0, view1 in heads:
        sums += [cluster_mass(view0), cluster_mass(view1)]
        sums += _contrast_sums(view0, view1, options)
    return sums


def _smoothed(sums: list[Tensor], running: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    return sums if running is None else _split(running(_flat(sums)), sums)


def _of_the_whole_batch(
    sums: list[Tensor],
    statistics: Tensor,
    running: Callable[[Tensor], Tensor] | None,
    spans_ranks: bool,
    validate_args: bool,
) -> list[Tensor]:
    """Return `statistics` in parts as of `sums`, with the gradient of `sums`."""
    if running is not None:
        raise ValueError(
            "statistics: expected None together with running statistics, which would take in every "
            "micro-batch as a step"
        )
    own = _flat(sums)
    if not isinstance(statistics, Tensor):
        raise TypeError(
            "statistics: expected a vector as c2bin_statistics returns, "
            f"got {type(statistics).__name__}"
        )
    if statistics.shape != own.shape:
        raise ValueError(
            f"statistics: expected shape {tuple(own.shape)} as c2bin_statistics returns for the "
            f"same heads and options, got shape {tuple(statistics.shape)}"
        )
    if not statistics.is_floating_point():
        raise TypeError(
            "statistics: expected floating-point sums as c2bin_statistics returns, "
            f"got {statistics.dtype}"
        )
    _checks.same_device("statistics", statistics, "predictions[0]", own)
    if validate_args:
        _checks.validate_finite("statistics", statistics)
    # The W equal losses of the ranks, which DDP averages, as in `sum_over_ranks`.
    own = own * world_size() if spans_ranks else own
    return _split(at_value_of(own, statistics.to(own.dtype)), sums)


def _flat(sums: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in sums])


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [part.numel() for part in like])
    return [part.reshape(shaped.shape) for part, shaped in zip(parts, like, strict=True)]


def _spans_ranks(gather_distributed: bool) -> bool:
    return _checks.flag("gather_distributed", gather_distributed) and world_size() > 1


def _check_embeddings(
    name0: str, prediction: Tensor, name1: str, target: Tensor, validate_args: bool
) -> None:
    for name, tensor in ((name0, prediction), (name1, target)):
        _checks.matrix(name, tensor, "(n, d)")
        if _checks.flag("validate_args", validate_args):
            _checks.validate_finite(name, tensor)
    _checks.same_shape(name1, target, name0, prediction)


def _check_assignments(name: str, assignments: Tensor, validate_args: bool) -> None:
    _checks.matrix(name, assignments, "(n, K)", min_columns=2)
    if _checks.flag("validate_args", validate_args):
        _checks.validate_assignments(name, assignments)


def _check_aligned(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    symmetric_alignment: bool,
    validate_args: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs (prediction, target of the other view) that Eq. 1 compares."""
    _checks.pair("predictions", predictions, "(p0, p1)")
    _checks.pair("targets", targets, "(z0, z1)")
    directions = (0, 1) if symmetric_alignment else (0,)
    for view in directions:
        _check_embeddings(
            f"predictions[{view}]",
            predictions[view],
            f"targets[{1 - view}]",
            targets[1 - view],
            validate_args,
        )
    if symmetric_alignment:
        _checks.same_shape("predictions[1]", predictions[1], "predictions[0]", predictions[0])
    return [(predictions[view], targets[1 - view]) for view in directions]


def _contrasted(
    assignments: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]] | None,
    prediction: Tensor,
    validate_args: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs to contrast: per head both views, or each with the follower's other one."""
    heads = _check_heads("assignments", assignments, prediction, validate_args)
    if targets is None:
        return heads
    fixed = _check_heads("target_assignments", targets, prediction, validate_args)
    clusters, wanted = ([pair[0].shape[1] for pair in pairs] for pairs in (fixed, heads))
    if clusters != wanted:
        raise ValueError(
            f"target_assignments: expected heads of {wanted} clusters as assignments has, "
            f"got {clusters}"
        )
    return [
        pair
        for own, other in zip(heads, fixed, strict=True)
        for pair in ((own[0], other[1].detach()), (own[1], other[0].detach()))
    ]


def _check_heads(
    argument: str,
    assignments: Sequence[Sequence[Tensor]],
    prediction: Tensor,
    validate_args: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Return per head the assignments of both views."""
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
    pairs = list(zip(*assignments, strict=True))
    for head, views in enumerate(pairs):
        names = [f"{argument}[{view}][{head}]" for view in range(2)]
        for name, tensor in zip(names, views, strict=True):
            _check_assignments(name, tensor, validate_args)
        _checks.same_shape(names[1], views[1], names[0], views[0])
        for name, tensor in zip(names, views, strict=True):
            if tensor.shape[0] != prediction.shape[0]:
                raise ValueError(
                    f"{name}: expected n = {prediction.shape[0]} rows as predictions[0] has, "
                    f"got shape {tuple(tensor.shape)}"
                )
            _checks.same_device(name, tensor, "predictions[0]", prediction)
    return pairs


class _ContrastOptions(NamedTuple):
    temperature: float
    similarity: str
    positive_in_denominator: bool
    symmetric: bool


def _contrast_options(
    temperature: float, similarity: str, positive_in_denominator: bool, symmetric: bool
) -> _ContrastOptions:
    return _ContrastOptions(
        _checks.finite_number("temperature", temperature, above=0),
        _checks.choice("similarity", similarity, _checks.SIMILARITIES),
        _checks.flag("positive_in_denominator", positive_in_denominator),
        _checks.flag("symmetric", symmetric),
    )


def _contrast_sums(view0: Tensor, view1: Tensor, options: _ContrastOptions) -> list[Tensor]:
    """Return what Eq. 4 needs of a batch: the Gram matrix C'ᵀC'' and, for cosines, ‖c_k‖²."""
    floors = smallest_square(view0.dtype), smallest_square(view1.dtype)
    view0, view1 = at_least_float32(view0, view1)
    with without_autocast(view0):
        gram = view0.T @ view1
    if options.similarity == "dot":
        return [gram]
    squares = (view0 * view0).sum(dim=0), (view1 * view1).sum(dim=0)
    return [
        gram,
        *(torch.threshold(s, floor, 0.0) for s, floor in zip(squares, floors, strict=True)),
    ]


def _contrast_from_sums(sums: Iterator[Tensor], options: _ContrastOptions) -> Tensor:
    """Eq. 4 from the sums over instances of `_contrast_sums`, which are next in `sums`."""
    logits = next(sums) / options.temperature
    if options.similarity == "cosine":
        logits = logits * inverse_norm(next(sums))[:, None] * inverse_norm(next(sums))
    negatives = logits
    if not options.positive_in_denominator:
        own = torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device)
        negatives = logits.masked_fill(own, -torch.inf)
    # Subtracted cluster by cluster: with dot products both run into the thousands, where a
    # difference of means would lose digits.
    positive = logits.diagonal()
    loss = (negatives.logsumexp(dim=1) - positive).mean()
    if options.symmetric:
        loss = (loss + (negatives.logsumexp(dim=0) - positive).mean()) / 2
    return loss


def _local_contrast(view0: Tensor, view1: Tensor, options: _ContrastOptions) -> Tensor:
    def formula(view0: Tensor, view1: Tensor) -> Tensor:
        return _contrast_from_sums(iter(_contrast_sums(view0, view1, options)), options)

    if (
        options.similarity == "cosine"
        and options.temperature >= _fused.MIN_TEMPERATURE
        and _fused.usable(view0, view1)
    ):
        floors = smallest_square(view0.dtype), smallest_square(view1.dtype)
        view0, view1 = at_least_float32(view0, view1)
        return _fused.cosine_contrast(
            view0,
            view1,
            options.temperature,
            options.positive_in_denominator,
            options.symmetric,
            floors,
            formula,
        )
    return formula(view0, view1)


def _balance_gap(mass: Tensor) -> Tensor:
    """Eq. 5 as log K - H(ŝ), from the masses of the clusters."""
    # Without any mass, shares and gradient are 0.
    share = mass / torch.threshold(mass.sum(), SMALLEST_MASS, torch.inf)
    # Σ ŝ log(K ŝ) is log K - H(ŝ) without the cancellation near balance.
    ratio = share * share.shape[0]
    gap = (share * ratio.clamp_min(SMALLEST_RATIO).log()).sum()
    # Rounding can leave it a little below 0; the derivatives there are those of the formula.
    return gap + (-gap).clamp_min(0).detach()


def _balance_gaps(masses: Sequence[Tensor]) -> Tensor:
    """Eq. 5 as log K - H(ŝ), summed over heads and views."""

    def formula(*masses: Tensor) -> Tensor:
        return reduce(torch.add, (_balance_gap(mass) for mass in masses))

    if _fused.usable(*masses):
        return _fused.balance_gaps(at_least_float32(*masses), formula)
    return formula(*masses)


def _cosine_sum(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum of the cosines of Eq. 1 over instances."""
    dtypes = prediction.dtype, target.dtype
    prediction, target = at_least_float32(prediction, target.detach())
    return (unit_rows(prediction, dtypes[0]) * unit_rows(target, dtypes[1])).sum()
