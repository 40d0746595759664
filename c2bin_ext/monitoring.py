"""Watch cluster heads during validation: their scores over all ranks, and a word when one dies.

Needs the extra `eval` (scikit-learn, scipy): `pip install "c2bin-ext[eval]"`. Host-independent: the
adapters call it from their validation hooks, and so can any training loop.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from c2bin_ext import _checks, metrics
from c2bin_ext._hosts import described
from c2bin_ext.distributed import world_size

__all__ = ["ClusterMonitor", "warn_if_more_clusters_than_images"]

# A head that uses less than this share of its clusters, or whose assignments tell less than this
# share of log K about an image, has collapsed. A trained head is far from both.
_LEAST_USE = 0.1
_LEAST_INFORMATION = 0.01
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class _Seen(NamedTuple):
    """What one rank saw, on the CPU."""

    labels: Tensor  # (n,)
    clusters: list[Tensor]  # per head (n,): the largest assignment
    others: list[Tensor]  # the same of the other view; empty without one
    masses: list[Tensor]  # per head (K,): sum of assignments over images
    row_entropies: Tensor  # (heads,): sum over images of the entropy of their assignment


class ClusterMonitor:
    """Scores of every cluster head over one pass through validation data, equal on all ranks.

    Scores of head i with K clusters come as `{prefix}{score}_{i}_of_{K}`, where score is

    * `nmi`, `acc`, `purity`, `ari`: the clusters (the largest assignment of each image) against the
      labels, see `c2bin_ext.metrics`; left out when no image is labelled;
    * `clusters_in_use`: clusters that hold an image;
    * `effective_clusters`: exp of the entropy of the mean assignment, from 1 to K;
    * `agreement`: share of images that have the same cluster in both views, when a second view was
      given.

    Warns, once until it recovers, when a head has collapsed: onto few clusters, or onto the same
    assignment for every image.

    Args:
        num_clusters: K of each head.
        prefix: Put before the name of every score.

    Raises:
        TypeError: `num_clusters` is not a sequence of ints.
        ValueError: `num_clusters` is empty or holds a number below 2.

    Examples:
        >>> monitor = ClusterMonitor([3])
        >>> assignments = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
        >>> monitor.update([assignments], labels=torch.tensor([0, 1, 1]))
        >>> scores = monitor.compute()
        >>> scores["val_clusters_in_use_0_of_3"], round(scores["val_acc_0_of_3"], 3)
        (3.0, 0.667)
    """

    def __init__(self, num_clusters: Sequence[int], prefix: str = "val_") -> None:
        self.num_clusters = _checks.cluster_counts(num_clusters)
        self.prefix = prefix
        self._warned: set[tuple[int, str]] = set()
        self.reset()

    def reset(self, dataloader: object | None = None) -> None:
        """Start a new pass.

        Args:
            dataloader: What is iterated on this rank. If its sampler is a
                `torch.utils.data.DistributedSampler`, the items that it repeats, so that all ranks
                have equally many, are not counted.
        """
        self._limit: int | None = None
        sampler = getattr(dataloader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            # The sampler deals out item rank, rank + W, … of the (shuffled) data set and pads at
            # the end.
            items = len(sampler.dataset)  # type: ignore[arg-type]
            self._limit = len(range(sampler.rank, items, sampler.num_replicas))
        self._seen = 0
        self._labels: list[Tensor] = []
        self._clusters: list[list[Tensor]] = [[] for _ in self.num_clusters]
        self._others: list[list[Tensor]] = [[] for _ in self.num_clusters]
        # Numbers that take dtype and device of what is added to them.
        self._masses = [torch.zeros(()) for _ in self.num_clusters]
        self._row_entropies = torch.zeros(())

    @torch.no_grad()
    def update(
        self,
        assignments: Sequence[Tensor],
        labels: Tensor,
        other_view: Sequence[Tensor] | None = None,
    ) -> None:
        """Take in a batch; after a pass's first batch it reads no value, so waits for no GPU.

        Args:
            assignments: Each head's soft assignments, shape (n, K), rows sum to 1.
            labels: Classes, shape (n,), integers, below zero if unlabelled.
            other_view: Each head's assignments of the same images in another view.

        Raises:
            TypeError: If the labels are no tensor.
            ValueError: If the number of heads, a shape or the labels' dtype is not what was
                expected, rows of the first batch are not finite or do not sum to 1, or a second
                view was given for some batches and not for others.
        """
        if not isinstance(labels, Tensor):
            raise TypeError(
                "labels: expected a tensor of integers (n,), below zero if unlabelled, got "
                f"{described(labels)}"
            )
        if labels.ndim != 1 or labels.dtype not in _INTEGERS:
            raise ValueError(
                f"labels: expected integers of shape (n,), below zero if unlabelled, got "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        n = len(labels)
        for name, given in (("assignments", assignments), ("other_view", other_view)):
            if given is not None:
                self._check(name, given, n)
        if self._labels and bool(self._others[0]) != (other_view is not None):
            raise ValueError(
                "other_view: expected for every batch of a pass or for none, got a mixture"
            )
        keep = n if self._limit is None else max(0, min(n, self._limit - self._seen))
        self._seen += n
        if keep == 0:
            return
        self._labels.append(labels[:keep])
        entropies = []
        for head, rows in enumerate(assignments):
            # Apple's MPS has no float64.
            rows = rows[:keep] if rows.device.type == "mps" else rows[:keep].double()
            self._clusters[head].append(rows.argmax(dim=1))
            if other_view is not None:
                self._others[head].append(other_view[head][:keep].argmax(dim=1))
            self._masses[head] = self._masses[head] + rows.sum(dim=0)
            entropies.append(torch.special.entr(rows).sum())
        self._row_entropies = self._row_entropies + torch.stack(entropies)

    def compute(self) -> dict[str, float]:
        """Return the scores of everything seen since `reset`, on all ranks; a collective.

        Returns:
            Scores by name, the same on every rank; empty when no rank saw an image.

        Raises:
            ValueError: If assignments of a head were not finite; on all ranks.

        Examples:
            >>> ClusterMonitor([3]).compute()
            {}
        """
        parts = [part for part in _gather(self._local()) if part is not None]
        if not parts:
            return {}
        labels = torch.cat([part.labels for part in parts])
        row_entropies = torch.stack([part.row_entropies for part in parts]).sum(dim=0)
        scores: dict[str, float] = {}
        for head, k in enumerate(self.num_clusters):
            clusters = torch.cat([part.clusters[head] for part in parts])
            mean = torch.stack([part.masses[head] for part in parts]).sum(dim=0) / len(labels)
            _checks.validate_finite(f"mean assignment of head {head} of {k} clusters", mean)
            result: dict[str, float] = {}
            if bool((labels >= 0).any()):
                result["nmi"] = metrics.normalized_mutual_information(labels, clusters)
                result["acc"] = metrics.clustering_accuracy(labels, clusters)
                result["purity"] = metrics.purity(labels, clusters)
                result["ari"] = metrics.adjusted_rand_index(labels, clusters)
            result["clusters_in_use"] = float(metrics.clusters_in_use(clusters))
            # Of a single row, the mean assignment is that row.
            result["effective_clusters"] = metrics.effective_clusters(mean[None])
            if all(part.others for part in parts):
                others = torch.cat([part.others[head] for part in parts])
                result["agreement"] = float((clusters == others).double().mean())
            # Entropy of the mean minus mean entropy: what an assignment tells about its image.
            information = math.log(result["effective_clusters"]) - float(
                row_entropies[head] / len(labels)
            )
            self._warn(head, k, len(labels), result, information)
            scores.update(
                {f"{self.prefix}{name}_{head}_of_{k}": value for name, value in result.items()}
            )
        return scores

    def _check(self, name: str, assignments: Sequence[Tensor], n: int) -> None:
        shapes = [tuple(a.shape) for a in assignments]
        expected = [(n, k) for k in self.num_clusters]
        if shapes != expected:
            raise ValueError(
                f"{name}: expected one tensor per head of shapes {expected}, got {shapes}"
            )
        if n and not self._labels:
            for head, (k, rows) in enumerate(zip(self.num_clusters, assignments, strict=True)):
                _checks.validate_assignments(f"{name} of head {head} of {k} clusters", rows)

    def _local(self) -> _Seen | None:
        if not self._labels:
            return None
        return _Seen(
            torch.cat(self._labels).cpu(),
            [torch.cat(batches).cpu() for batches in self._clusters],
            [torch.cat(batches).cpu() for batches in self._others if batches],
            [mass.cpu().double() for mass in self._masses],
            self._row_entropies.cpu().double(),
        )

    def _warn(
        self, head: int, k: int, images: int, result: dict[str, float], information: float
    ) -> None:
        used, effective = result["clusters_in_use"], result["effective_clusters"]
        least = 1 + _LEAST_USE * (min(k, images) - 1)
        problems = {
            "few": (
                min(used, effective) < least,
                f"{int(used)} of its clusters hold an image and {effective:.1f} are effectively in "
                "use. A larger entropy_weight spreads images over clusters.",
            ),
            "same": (
                images > 1 and information < _LEAST_INFORMATION * math.log(k),
                "nearly the same assignment comes out for every image. A smaller entropy_weight or "
                "temperature lets assignments become definite.",
            ),
        }
        for kind, (bad, what) in problems.items():
            if bad and (head, kind) not in self._warned:
                self._warned.add((head, kind))
                if world_size() == 1 or dist.get_rank() == 0:
                    warnings.warn(
                        f"Cluster head {head} of {k} clusters has collapsed: {what}", stacklevel=3
                    )
            elif not bad:
                self._warned.discard((head, kind))


def warn_if_more_clusters_than_images(num_clusters: Sequence[int], batch_size: int) -> None:
    """Warn when a head has more clusters than a global batch has images.

    Most clusters then get no image in a batch, and their contrast is noise: the paper's own runs
    with 2048 clusters at batch 256 lose to MoCo v2 (Table 2).

    Args:
        num_clusters: K of each head.
        batch_size: Images of one view in the batch of all ranks together.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_if_more_clusters_than_images([32, 512], batch_size=256)
        >>> print(str(caught[0].message)[:57])
        A head has 512 clusters but a global batch has 256 images
    """
    largest = max(_checks.cluster_counts(num_clusters))
    if largest > _checks.whole_number("batch_size", batch_size, 1):
        warnings.warn(
            f"A head has {largest} clusters but a global batch has {batch_size} images: most "
            "clusters get no image in a batch, which makes their contrast noisy. Use a larger "
            "batch or fewer clusters.",
            stacklevel=2,
        )


def _gather(part: _Seen | None) -> list[_Seen | None]:
    if world_size() == 1:
        return [part]
    parts: list[_Seen | None] = [None] * world_size()
    dist.all_gather_object(parts, part)
    return parts
