"""Clusters of fixed features at several scales, as a scikit-learn estimator.

Needs the extra `eval` (scikit-learn, scipy): `pip install 'c2bin-ext[eval]'`. `import c2bin_ext`
alone never imports this module.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from numbers import Integral, Real
from typing import Any, TypeAlias, Union

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.special import xlogy

try:
    import numpy as np
    import numpy.typing as npt
    from scipy.linalg import eigh
    from sklearn.base import BaseEstimator, ClusterMixin
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.validation import assert_all_finite, check_is_fitted

    from c2bin_ext.metrics import effective_clusters
except ImportError as error:
    raise ImportError(
        f"c2bin_ext.clustering needs scikit-learn and scipy ({error}): "
        "pip install 'c2bin-ext[eval]'"
    ) from error

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # a method of the estimator until scikit-learn 1.6
    validate_data = None

from c2bin_ext.heads import MultiScaleClusterHead
from c2bin_ext.losses import MultiScaleClusterLoss

__all__ = ["C2BINClustering"]

Array: TypeAlias = "npt.NDArray[Any]"
# Union, because the right-hand side of an alias is evaluated: Python 3.10 must be able to run it.
Rows: TypeAlias = Union["npt.NDArray[Any]", Tensor, Sequence[Sequence[float]]]

# Values that are held at a time as float32 beside the data: 16 MiB.
_BLOCK = 2**22
# Neighbours are exact among so many rows; of more, in random parts of so many each.
_PART = 50_000
# Principal directions that are kept.
_DIRECTIONS = 256
# Of more rows, neighbours are searched in faiss's inverted lists, in this share of them.
_PROBED = 1 / 32
# Rows that k-means is fitted on, at most; its starts at a scale of few clusters.
_SAMPLE, _STARTS, _FEW = 20_000, 10, 20
# Steps that count as an epoch where there are few rows.
_LEAST_STEPS = 5
# Training stops when so many epochs in a row have not lowered the smallest loss by this much.
_PATIENCE, _TOLERANCE = 10, 1e-3
# With entropy_weight="auto", the first of these is tried, and the others where its clusters agree
# less with neighbours than those of k-means.
_WEIGHTS = (1.0, 0.1, 0.03)
# A head that uses less than this share of its clusters has collapsed.
_LEAST_USE = 0.1
_FLOATS = [np.float32, np.float64, np.float16]
# scikit-learn 1.6 renamed the argument.
_FINITE = next(
    name
    for name in ("ensure_all_finite", "force_all_finite")
    if name in inspect.signature(check_array).parameters
)


class C2BINClustering(ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Clusters of the fixed features of a pretrained network, at several scales.

    Formula: minimises `Σ_K (L_bca + λ_ent L_ent)`, Eq. 5-6, over one head for each K, where the
    second view of an image is one of its nearest neighbours or, with `views`, an augmented view of
    one that is mutual: each is among the nearest of the other. To both, what some other image and
    its nearest neighbour differ by is added, which is how images of one kind vary.

    Features are standardised, projected to their first 256 principal directions and L2-normalised;
    these are held, n x 256 float32 (and as many for each of `views`), and never an n x n matrix. X
    itself, which may be a memory map of any floating-point dtype, is read in blocks. Neighbours are
    exact among up to 50,000 rows; of more, they are approximate where faiss is installed, and exact
    within random parts of that size where it is not.

    Heads start from k-means of every scale, so that the loss begins where k-means ends. Whether it
    ends better is told without labels by `agreement_per_scale_`: where the first scale agrees less
    than k-means did, other weights of the entropy are tried and, if none helps, k-means is kept.

    Args:
        n_clusters: K of each scale, or one int; the first is what `labels_` and `predict` are of.
        n_neighbors: how many nearest neighbours count as an image's second views.
        hidden_features: width of the heads' hidden layer; None: no such layer.
        temperature: τ > 0 of the contrast, see `BCAContrastiveLoss`.
        entropy_weight: λ_ent >= 0; more of it makes clusters more equal in size. `"auto"`: 1, or
            what agrees best of 1, 0.1, 0.03 and k-means, if k-means agrees more than 1 does.
        max_epochs: passes over the rows (or five steps, if that is more), at most; training stops
            earlier where the loss does.
        batch_size: rows a step; all of them if there are fewer.
        learning_rate: of AdamW.
        device: `"auto"` (a GPU if there is one) or what `torch.device` takes.
        random_state: an int makes results reproducible; or a numpy RandomState to draw from, or
            None. Global random states of torch and numpy are never touched.
        verbose: print progress.

    Attributes:
        labels_: (n,), the cluster of every training row at the first scale.
        labels_per_scale_: the same for every scale.
        agreement_per_scale_: how far the clusters of an image tell those of its neighbours, from 0
            to 1: the mutual information of both over their entropy.
        entropy_weight_: λ_ent that was trained with, or None: k-means agreed more and was kept.
        losses_: the mean loss of every epoch of the run that was kept.
        loss_: the last of them.
        n_iter_: how many epochs it took.
        head_: the trained `MultiScaleClusterHead` of the projected features, on the CPU.
        mean_: (d,), subtracted from features.
        components_: (d, p), which standardise and project them.
        n_features_in_: d.

    Raises:
        TypeError, ValueError: at `fit`, an argument of the wrong type or value; X that holds NaN,
            has one row, or fewer rows than clusters; views of another shape; at `predict`, another
            number of features.

    Examples:
        >>> import numpy as np
        >>> from c2bin_ext.clustering import C2BINClustering
        >>> centres = 5 * np.eye(3).repeat(100, axis=0)
        >>> features = centres + np.random.default_rng(0).normal(size=centres.shape)
        >>> model = C2BINClustering(n_clusters=(3, 6), random_state=0).fit(features)
        >>> [len(set(labels.tolist())) for labels in model.labels_per_scale_]
        [3, 6]

    New images are clustered by `predict`; training goes through all rows again, as there is no
    `partial_fit`: neighbours of new rows among old ones are what the loss lives on.

    Source: C2BIN, sections 3.3 and 3.4; neighbours as second views: Van Gansbeke et al., "SCAN",
    ECCV 2020.
    """

    # Steps in which heads learn the labels of k-means before the loss takes over.
    _warm_up = 25
    # How many differences of neighbours are added to a row, without views and with them.
    _jitter = 1.0, 0.5

    def __init__(
        self,
        n_clusters: int | Sequence[int] = (10, 40, 160),
        *,
        n_neighbors: int = 20,
        hidden_features: int | None = 512,
        temperature: float = 0.5,
        entropy_weight: float | str = "auto",
        max_epochs: int = 60,
        batch_size: int = 512,
        learning_rate: float = 1e-3,
        device: str = "auto",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_neighbors = n_neighbors
        self.hidden_features = hidden_features
        self.temperature = temperature
        self.entropy_weight = entropy_weight
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self,
        X: Rows,  # noqa: N803
        y: object = None,
        views: Rows | None = None,
        callback: Callable[[int, float], object] | None = None,
    ) -> C2BINClustering:
        """Cluster the rows of X.

        Args:
            X: features, (n, d): a numpy array or memory map, or a torch tensor.
            y: ignored; scikit-learn passes it.
            views: features of v augmented views of the same images, (v, n, d), to which X is
                added as one more. They are most of the lead over k-means: store them if the
                images are at hand.
            callback: is called after every epoch with its number, from 1 to `max_epochs` at most,
                and its mean loss; with 1 again where another weight is tried.

        Returns:
            The estimator itself. Ctrl-C in training ends it with a warning, and what was learned
            until then is kept.

        Raises:
            TypeError, ValueError: see the class.
        """
        scales, weights = self._checked_options()
        values = self._checked(X, reset=True)
        n, d = values.shape
        if n < max(2, *scales):
            raise ValueError(
                f"X: expected at least {max(scales)} rows, as many as clusters, "
                f"got {n} sample{'s' if n > 1 else ''} (n_samples={n})"
            )
        # By scikit-learn's convention None would draw from numpy's global state.
        given = self.random_state
        source = np.random.RandomState() if given is None else check_random_state(given)
        for_parts, seed = (int(drawn) for drawn in source.randint(2**31 - 1, size=2))
        device = _device(self.device)
        progress = _Progress(self.verbose, callback)
        progress(f"{n} rows of {d} features: standardising")
        self.mean_, self.components_ = _principal(values)
        rows = self._projected(values, "X").to(device)
        second = rows[None]
        if views is not None:
            stored = _checked_views(views, n, d)
            # The rows stay among them: they are what is predicted, and a view may be a bad one.
            augmented = (self._projected(view, "views").to(device) for view in stored)
            second = torch.stack([rows, *augmented])
        progress("neighbours")
        nearest = _nearest(rows, min(self.n_neighbors, n - 1), for_parts)
        # Where nothing but the neighbour differs between the views, more of them serve better than
        # mutual ones, which are nearer to being of one class.
        counts = torch.full_like(nearest[:, 0], nearest.shape[1])
        pairs = (
            _Pairs(second, nearest, counts, self._jitter[0])
            if views is None
            else _Pairs(second, *_mutual(nearest), self._jitter[1])
        )
        progress("k-means, to start from")
        start = _Start.of(rows, pairs, scales, seed)
        best = self._train(pairs, start, weights[0], progress)
        if weights[1:] and not best.interrupted and best.agreement[0] < start.agreement[0]:
            progress("k-means agrees more with neighbours: other weights of the entropy")
            tried = [best]
            while len(tried) < len(weights) and not tried[-1].interrupted:
                tried.append(self._train(pairs, start, weights[len(tried)], progress))
            best = max(tried, key=lambda run: run.agreement[0])
            if best.agreement[0] < start.agreement[0]:
                progress("k-means still agrees more: its clusters are kept")
                best = replace(
                    best, head=start.head, entropy_weight=None, agreement=start.agreement
                )
        self.head_ = best.head.cpu().double()
        self.losses_, self.n_iter_ = best.losses, len(best.losses)
        self.loss_ = best.losses[-1] if best.losses else math.inf
        self.entropy_weight_, self.agreement_per_scale_ = best.entropy_weight, best.agreement
        # One block's assignments at a time: those of all rows and scales may not fit.
        labels = [
            [scale.argmax(dim=1).numpy() for scale in self._assign(block)]
            for block in _blocks(values, "X")
        ]
        self.labels_per_scale_ = [np.concatenate(parts) for parts in zip(*labels, strict=True)]
        self.labels_ = self.labels_per_scale_[0]
        _warn_of_collapse(self.labels_per_scale_, scales)
        return self

    def predict(self, X: Rows, scale: int = 0) -> Array:  # noqa: N803
        """Return the most probable cluster of every row.

        Args:
            X: features, (n, d), as in `fit`; the images need not have been trained on.
            scale: which of `n_clusters`, by its place.

        Returns:
            (n,), int64.

        Raises:
            ValueError: X with another number of features, NaN; no such scale.
        """
        return np.concatenate([part.argmax(axis=1) for part in self._probabilities(X, scale)])

    def predict_proba(self, X: Rows, scale: int = 0) -> Array:  # noqa: N803
        """Return the assignments of every row to the clusters of one scale.

        Args:
            X: features, (n, d), as in `fit`.
            scale: which of `n_clusters`, by its place.

        Returns:
            (n, K), rows sum to 1.

        Raises:
            ValueError: as `predict`.
        """
        return np.concatenate(list(self._probabilities(X, scale)))

    def _probabilities(self, X: Rows, scale: int) -> Iterator[Array]:  # noqa: N803
        check_is_fitted(self)
        scales = self.head_.num_clusters
        if not isinstance(scale, Integral) or not 0 <= scale < len(scales):
            raise ValueError(
                f"scale: expected an int from 0 to {len(scales) - 1}, the place of one of "
                f"n_clusters={scales}, got {scale!r}"
            )
        values = self._checked(X, reset=False)
        return (self._assign(block)[scale].numpy() for block in _blocks(values, "X"))

    @torch.inference_mode()
    def _assign(self, block: Array) -> tuple[Tensor, ...]:
        # In float64 the assignments of a row do not depend on the rows beside it.
        assignments: tuple[Tensor, ...] = self.head_(self._project(block))
        return assignments

    def _project(self, block: Array) -> Tensor:
        rows = torch.from_numpy((block.astype(np.float64) - self.mean_) @ self.components_)
        projected: Tensor = normalize(rows, eps=1e-12) * rows.shape[1] ** 0.5
        return projected

    def _projected(self, values: Array, name: str) -> Tensor:
        return torch.cat([self._project(block).float() for block in _blocks(values, name)])

    def _checked(self, X: Rows, reset: bool) -> Array:  # noqa: N803
        """Return X as an array of floats, its values yet unread if it is one."""
        # NaN is looked for block by block, as a memory map may not fit.
        options = {"dtype": _FLOATS, _FINITE: False}
        rows = _as_numpy(X)
        values: Array = (
            validate_data(self, rows, reset=reset, **options)
            if validate_data
            else self._validate_data(rows, reset=reset, **options)
        )
        return values

    def _checked_options(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Check the constructor's arguments; return the scales and the entropy weights to try."""
        given = self.n_clusters
        scales = (
            tuple(given)
            if isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str)
            else (given,)
        )
        if not scales:
            raise ValueError(f"n_clusters: expected an int >= 2 or several, got {given!r}")
        for k in scales:
            _whole("n_clusters", k, 2)
        for name in ("n_neighbors", "max_epochs"):
            _whole(name, getattr(self, name), 1)
        _whole("batch_size", self.batch_size, 2)
        if self.hidden_features is not None:
            _whole("hidden_features", self.hidden_features, 1)
        if not isinstance(self.learning_rate, Real) or not 0 < self.learning_rate < np.inf:
            raise ValueError(
                f"learning_rate: expected a finite number > 0, got {self.learning_rate!r}"
            )
        weight = self.entropy_weight
        if isinstance(weight, str) and weight != "auto":
            raise ValueError(f'entropy_weight: expected a number >= 0 or "auto", got {weight!r}')
        weights = _WEIGHTS if isinstance(weight, str) else (weight,)
        for own in weights:
            self._criterion(own)
        return tuple(int(k) for k in scales), weights

    def _criterion(self, entropy_weight: float) -> Callable[[Any], Any]:
        return MultiScaleClusterLoss(entropy_weight=entropy_weight, temperature=self.temperature)

    @torch.enable_grad()
    def _train(
        self,
        pairs: _Pairs,
        start: _Start,
        entropy_weight: float,
        progress: _Progress,
    ) -> _Run:
        """Train heads from the labels of k-means on; Ctrl-C ends it."""
        (_, n, p), device = pairs.views.shape, pairs.views.device
        source = torch.Generator().manual_seed(start.seed)
        head = _new_head(p, start.head.num_clusters, self.hidden_features, start.seed).to(device)
        criterion = self._criterion(entropy_weight)
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.learning_rate)
        size = min(self.batch_size, n)
        batches = _batches(n, size, source, device)

        def step(loss: Tensor) -> float:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.item()

        run = _Run(head, entropy_weight)
        try:
            for rows in islice(batches, self._warm_up):
                logits = head.logits(pairs.draw(rows, source))
                labels = [own[rows] for own in start.labels]
                step(torch.stack([*map(cross_entropy, logits, labels)]).sum())
            for epoch in range(self.max_epochs):
                losses = []
                for rows in islice(batches, max(n // size, _LEAST_STEPS)):
                    near = pairs.neighbor(rows, source)
                    both = tuple(head(pairs.draw(own, source)) for own in (rows, near))
                    losses.append(step(criterion(both).loss))
                run.losses.append(sum(losses) / len(losses))
                progress.epoch(epoch + 1, self.max_epochs, run.losses[-1])
                if run.settled():
                    break
        except KeyboardInterrupt:
            run.interrupted = True
            warnings.warn(
                f"Interrupted after {len(run.losses)} of {self.max_epochs} epochs: what was "
                "learned until then is kept.",
                stacklevel=4,
            )
        head.eval()
        run.agreement = pairs.agreement_per_scale(head)
        return run


@dataclass
class _Run:
    """A head in training, with the mean loss of every epoch and the agreement of every scale."""

    head: MultiScaleClusterHead
    entropy_weight: float | None
    losses: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    interrupted: bool = False

    def settled(self) -> bool:
        """Whether the last epochs have not lowered the loss."""
        before, last = self.losses[:-_PATIENCE], self.losses[-_PATIENCE:]
        return bool(before) and min(last) > min(before) - _TOLERANCE


@dataclass(frozen=True)
class _Pairs:
    """What the loss contrasts: rows in their views, and the neighbours of each.

    Attributes:
        views: (v, n, p).
        nearest: (n, m), of which the first `counts` (n,) count.
        jitter: how much of the difference of two neighbours is added to a row.
    """

    views: Tensor
    nearest: Tensor
    counts: Tensor
    jitter: float

    def draw(self, rows: Tensor, source: torch.Generator) -> Tensor:
        """Return some rows (b, p), each in a random view and moved as neighbours differ."""
        drawn = _of_a_view(self.views, rows, source)
        if not self.jitter:
            return drawn
        other = torch.randint(len(self.nearest), (len(rows),), generator=source).to(rows.device)
        return drawn + self.jitter * (self.views[0, other] - self.views[0, self.nearest[other, 0]])

    def neighbor(self, rows: Tensor, source: torch.Generator) -> Tensor:
        """Return a random neighbour of each of some rows."""
        place = torch.rand(len(rows), generator=source).to(rows.device) * self.counts[rows]
        return self.nearest[rows, place.long()]

    def agreement(self, labels: Tensor, k: int) -> float:
        """Return the mutual information of rows' and neighbours' labels (v, n) over the entropy."""
        source = torch.Generator().manual_seed(0)
        joint = torch.zeros(k, k, dtype=torch.float64, device=labels.device)
        for place in range(self.nearest.shape[1]):
            rows = (place < self.counts).nonzero().squeeze(1)
            own = _of_a_view(labels, rows, source)
            near = _of_a_view(labels, self.nearest[rows, place], source)
            joint += torch.bincount(own * k + near, minlength=k * k).view(k, k)
        joint = (joint + joint.T) / (2 * joint.sum())
        share = joint.sum(dim=1)
        entropy = -xlogy(share, share).sum()
        if entropy == 0:
            return 0.0
        return float((xlogy(joint, joint).sum() + 2 * entropy) / entropy)

    def agreement_per_scale(self, head: MultiScaleClusterHead) -> list[float]:
        """Return the agreement of the head's labels."""
        views = zip(*(_labels(head, view) for view in self.views), strict=True)
        return [
            self.agreement(torch.stack(own), k)
            for own, k in zip(views, head.num_clusters, strict=True)
        ]


def _new_head(p: int, scales: tuple[int, ...], hidden: int | None, seed: int) -> Any:
    """Return a head, initialised from the seed without a touch of torch's global state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultiScaleClusterHead(p, scales, hidden_features=hidden)


@torch.inference_mode()
def _labels(head: MultiScaleClusterHead, rows: Tensor) -> list[Tensor]:
    """Return the most probable cluster of every row, (n,) for every scale."""
    parts = [
        [scale.argmax(dim=1) for scale in head.logits(block)]
        for block in torch.split(rows, _PART // 10)
    ]
    return [torch.cat(scale) for scale in zip(*parts, strict=True)]


def _of_a_view(values: Tensor, rows: Tensor, source: torch.Generator) -> Tensor:
    """Return some rows of (v, n, ...), each of a random view."""
    view = torch.randint(len(values), (len(rows),), generator=source)
    return values[view.to(rows.device), rows]


@dataclass(frozen=True)
class _Start:
    """k-means of every scale, from which training starts.

    Attributes:
        head: whose most probable cluster is that of the nearest centre.
        labels: (n,) each.
        agreement: of every scale.
    """

    seed: int
    head: MultiScaleClusterHead
    labels: list[Tensor]
    agreement: list[float]

    @classmethod
    def of(cls, rows: Tensor, pairs: _Pairs, scales: tuple[int, ...], seed: int) -> _Start:
        fitted = [_k_means(rows, k, seed) for k in scales]
        head = _new_head(rows.shape[1], scales, None, seed).to(rows.device)
        centres, variances = (torch.cat(parts).to(rows) for parts in zip(*fitted, strict=True))
        # Gaussians of that variance around the centres c have log-odds <x, c> - |c|²/2 over it.
        head.linear.weight.data = centres / variances[:, None]
        head.linear.bias.data = -centres.square().sum(dim=1) / 2 / variances
        return cls(seed, head, _labels(head, rows), pairs.agreement_per_scale(head))


class _Progress:
    """Lines with the seconds since the start, and a call after every epoch, on request."""

    def __init__(self, wanted: bool, callback: Callable[[int, float], object] | None) -> None:
        self.wanted, self.callback, self.began = wanted, callback, time.perf_counter()

    def __call__(self, text: str) -> None:
        if self.wanted:
            print(f"[C2BINClustering] {time.perf_counter() - self.began:6.1f} s  {text}")

    def epoch(self, number: int, most: int, loss: float) -> None:
        self(f"epoch {number} of {most}: loss {loss:.3f}")
        if self.callback is not None:
            self.callback(number, loss)


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")


def _device(given: str | torch.device) -> torch.device:
    if given == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(given)


def _as_numpy(rows: Rows) -> Any:
    """Return a tensor as an array, anything else as it came."""
    if not isinstance(rows, Tensor):
        return rows
    rows = rows.detach().cpu()
    return (rows.float() if rows.dtype is torch.bfloat16 else rows).numpy()


def _blocks(values: Array, name: str) -> Iterator[Array]:
    """Yield the rows in blocks, each checked to be finite."""
    rows = max(1, _BLOCK // values.shape[1])
    for start in range(0, len(values), rows):
        block = values[start : start + rows]
        assert_all_finite(block, input_name=name)
        yield block


def _checked_views(views: Rows, n: int, d: int) -> Array:
    options = {"dtype": _FLOATS, _FINITE: False, "allow_nd": True, "ensure_2d": False}
    values: Array = check_array(_as_numpy(views), input_name="views", **options)
    if values.ndim != 3 or len(values) < 1 or values.shape[1:] != (n, d):
        raise ValueError(
            f"views: expected shape (v, {n}, {d}), v views of each row of X, got {values.shape}"
        )
    return values


def _principal(values: Array) -> tuple[Array, Array]:
    """Return mean (d,) and components (d, p) of standardised rows."""
    scaler = StandardScaler()
    for block in _blocks(values, "X"):
        scaler.partial_fit(block.astype(np.float64))
    n, d = values.shape
    if d <= _DIRECTIONS:
        return scaler.mean_, np.diag(1 / scaler.scale_)
    covariance = np.zeros((d, d))
    for block in _blocks(values, "X"):
        rows = scaler.transform(block.astype(np.float64)).astype(np.float32)
        covariance += rows.T @ rows
    _, directions = eigh(covariance / n, subset_by_index=(d - _DIRECTIONS, d - 1))
    return scaler.mean_, directions / scaler.scale_[:, None]


def _k_means(rows: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return centres (k, p) of the best start, and the variance around them, k times."""
    values = rows.cpu().numpy()
    if len(values) > _SAMPLE:
        values = values[np.random.default_rng(seed).choice(len(values), _SAMPLE, replace=False)]
    with warnings.catch_warnings():
        # Equal rows make fewer clusters than asked for, which the heads can live with.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(k, n_init=_STARTS if k <= _FEW else 1, random_state=seed).fit(values)
    variance = torch.tensor(max(model.inertia_ / values.size, 1e-9))
    return torch.from_numpy(model.cluster_centers_), variance.expand(k)


def _nearest(rows: Tensor, k: int, seed: int) -> Tensor:
    """Return the nearest others of each row by cosine, (n, k); exact of up to `_PART` rows."""
    n = len(rows)
    if n > _PART and _faiss_is_installed():
        return _nearest_by_faiss(rows, k, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(rows.device)
    found = torch.empty(n, k, dtype=torch.int64, device=rows.device)
    for part in order.tensor_split(-(-n // _PART)):
        found[part] = part[_largest_products(rows[part], k)[1]]
    return found


def _largest_products(
    rows: Tensor, k: int, tell: Callable[[int, int], object] = lambda done, total: None
) -> tuple[Tensor, Tensor]:
    """Return the k largest products of each row with others, and which these are, (n, k) each."""
    n = len(rows)
    # Results that are kept block by block would lie between the blocks' memory, which then grows.
    values, places = rows.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=rows.device)
    for own in torch.split(torch.arange(n, device=rows.device), max(1, _BLOCK // n)):
        products = rows[own] @ rows.T
        products[own - own[0], own] = -torch.inf
        values[own], places[own] = products.topk(k, dim=1)
        tell(int(own[-1]) + 1, n)
    return values, places


def _faiss_is_installed() -> bool:
    return importlib.util.find_spec("faiss") is not None


def _nearest_by_faiss(rows: Tensor, k: int, seed: int) -> Tensor:
    """Return the nearest others of each row among those of the nearest of √n lists."""
    faiss: Any = importlib.import_module("faiss")
    values = np.ascontiguousarray(rows.cpu().numpy())
    n, p = values.shape
    lists = int(n**0.5)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(p), p, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed
    index.nprobe = max(8, int(lists * _PROBED))
    index.train(values)
    index.add(values)
    near = torch.from_numpy(index.search(values, k + 1)[1])
    # Equal rows may come before the row itself; -1 stands where the lists hold too few.
    own = torch.arange(n)[:, None]
    near = near.where(near >= 0, own)
    others_first = (near == own).byte().argsort(dim=1, stable=True)
    return near.gather(1, others_first)[:, :k].to(rows.device)


def _mutual(nearest: Tensor) -> tuple[Tensor, Tensor]:
    """Return neighbours, those first that have each other, and how many these are, 1 at least."""
    rows = torch.arange(len(nearest), device=nearest.device)
    parts = [
        (nearest[part] == own[:, None, None]).any(dim=2)
        for own, part in zip(
            torch.split(rows, _PART // 10), torch.split(nearest, _PART // 10), strict=True
        )
    ]
    both = torch.cat(parts)
    order = (~both).byte().argsort(dim=1, stable=True)
    return nearest.gather(1, order), both.sum(dim=1).clamp_min(1)


def _batches(n: int, size: int, source: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Yield random batches without end: all rows, but for what is left over, then all again."""
    while True:
        order = torch.randperm(n, generator=source)[: n // size * size]
        yield from torch.split(order.to(device), size)


def _warn_of_collapse(labels: list[Array], scales: tuple[int, ...]) -> None:
    for place, (own, k) in enumerate(zip(labels, scales, strict=True)):
        share = np.bincount(own, minlength=k) / len(own)
        effective = effective_clusters(torch.from_numpy(share)[None])
        if effective < 1 + _LEAST_USE * (k - 1):
            warnings.warn(
                f"Scale {place} of {k} clusters has collapsed: {np.count_nonzero(share)} hold a "
                f"row and {effective:.1f} are effectively in use. A larger entropy_weight spreads "
                "rows over clusters.",
                stacklevel=3,
            )
