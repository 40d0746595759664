"""Scores of frozen features: lightly's kNN, a linear probe in lightly's recipe, and k-means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from lightly.utils.benchmarking import knn_predict
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

__all__ = [
    "Features",
    "LinearProbe",
    "clustering_scores",
    "extract",
    "kmeans",
    "knn_accuracy",
    "linear_probe",
]


class Features(NamedTuple):
    """Features (n, d) of n images and their labels (n,)."""

    features: Tensor
    labels: Tensor


class LinearProbe(NamedTuple):
    """Test accuracy in [0, 1], the chosen learning rate, its accuracy on held-out images."""

    accuracy: float
    lr: float
    held_out_accuracy: float


def _check(name: str, given: Features, labelled: bool = True) -> None:
    """Refuse what no score can be computed of."""
    if not bool(torch.isfinite(given.features).all()):
        bad = int((~torch.isfinite(given.features)).any(dim=1).sum())
        raise ValueError(
            f"{name}: expected finite features, got NaN or infinite ones in {bad} of "
            f"{len(given.features)} rows"
        )
    unlabelled = int((given.labels < 0).sum()) if labelled else 0
    if unlabelled:
        raise ValueError(
            f"{name}: expected a class, 0 or more, for every image, got {unlabelled} of "
            f"{len(given.labels)} below 0; leave unlabelled images out"
        )


@torch.no_grad()
def extract(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    transform: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Features:
    """Return the features of a model in evaluation mode; the model's mode is put back afterwards.

    Args:
        model: Maps images (n, channels, height, width) to features that flatten to (n, d).
        batches: Yields `(images, labels, ...)`; without augmentation, in a fixed order.
        transform: Applied to each batch of images on the device, such as a normalisation.
        device: Where to compute; by default where the model's first parameter is.

    Returns:
        Features float32 (n, d) and labels int64 (n,), on that device.

    Raises:
        ValueError: If there are no batches.

    Examples:
        >>> from torch import nn
        >>> batches = [(torch.rand(4, 3, 2, 2), torch.arange(4))]
        >>> extract(nn.Flatten(), batches, device="cpu").features.shape
        torch.Size([4, 12])
    """
    device = next(model.parameters()).device if device is None else device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    features, labels = [], []
    try:
        for images, targets, *_ in batches:
            images = images.to(device)
            output = model(images if transform is None else transform(images))
            features.append(output.flatten(start_dim=1).float())
            labels.append(torch.as_tensor(targets, device=device))
    finally:
        for module, training in modes.items():
            module.training = training
    if not features:
        raise ValueError("batches is empty: there is nothing to extract features from")
    return Features(torch.cat(features), torch.cat(labels))


def knn_accuracy(
    train: Features, test: Features, k: int, temperature: float = 0.1, chunk: int = 512
) -> float:
    """Return the accuracy of lightly's weighted kNN on L2-normalised features.

    Args:
        train: The bank: features (n, d) and labels (n,).
        test: What to classify: features (m, d) and labels (m,).
        k: Neighbours. More than the bank holds means all of it: k is cut to n.
        temperature: A neighbour of cosine s votes with weight exp(s / temperature).
        chunk: Test rows compared at a time, which bounds memory.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: If k < 1, a feature is not finite or an image is unlabelled (below 0).

    Examples:
        >>> bank = Features(torch.eye(2), torch.tensor([0, 1]))
        >>> test = Features(torch.tensor([[2.0, 0.1], [0.1, 3.0]]), torch.tensor([0, 1]))
        >>> knn_accuracy(bank, test, k=1)
        1.0
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check("train", train)
    _check("test", test)
    bank = normalize(train.features, dim=1).t().contiguous()
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    right = 0
    parts = zip(torch.split(test.features, chunk), torch.split(test.labels, chunk), strict=True)
    for rows, labels in parts:
        predicted = knn_predict(
            normalize(rows, dim=1),
            bank,
            train.labels,
            classes,
            knn_k=min(k, bank.shape[1]),
            knn_t=temperature,
        )
        right += int((predicted[:, 0] == labels).sum())
    return right / len(test.labels)


def linear_probe(
    train: Features,
    test: Features,
    lrs: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    epochs: int = 90,
    batch_size: int = 256,
    held_out: float = 0.2,
    seed: int = 0,
) -> LinearProbe:
    """Train a linear classifier on frozen features, as lightly does, and return its test accuracy.

    lightly's recipe: SGD with momentum 0.9, no weight decay, cosine schedule, 90 epochs, learning
    rate × batch / 256. Here the features are extracted once, without augmentation. The learning
    rate is the one that does best on a random part of the TRAINING images; then a classifier is
    trained on all of them. The test images choose nothing.

    Args:
        train: Features (n, d) and labels (n,).
        test: Features (m, d) and labels (m,).
        lrs: Learning rates at batch 256 to choose from. With one, nothing is held out.
        epochs: Passes over the training features.
        batch_size: Rows of a batch.
        held_out: Share of the training rows that choose the learning rate.
        seed: Of the weights, the order and the held-out part; the global generators are left alone.

    Returns:
        Test accuracy in [0, 1], the chosen learning rate, its held-out accuracy (NaN with a single
        learning rate).

    Raises:
        ValueError: If `lrs` is empty, a feature is not finite or an image is unlabelled (below 0).

    Examples:
        >>> both = Features(torch.eye(2).repeat(8, 1), torch.arange(2).repeat(8))
        >>> linear_probe(both, both, lrs=(1.0,)).accuracy
        1.0
    """
    if not lrs:
        raise ValueError("lrs is empty: give at least one learning rate")
    _check("train", train)
    _check("test", test)
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1

    def fit(bank: Features, lr: float) -> nn.Linear:
        order = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = nn.Linear(bank.features.shape[1], classes).to(bank.features.device)
        rows = len(bank.labels)
        steps = epochs * -(-rows // batch_size)
        optimizer = torch.optim.SGD(
            classifier.parameters(), lr * min(batch_size, rows) / 256, momentum=0.9
        )
        schedule = CosineWarmupScheduler(optimizer, warmup_epochs=0, max_epochs=steps)
        for _ in range(epochs):
            shuffled = torch.randperm(rows, generator=order).to(bank.labels.device)
            for batch in torch.split(shuffled, batch_size):
                optimizer.zero_grad()
                loss = cross_entropy(classifier(bank.features[batch]), bank.labels[batch])
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
        return classifier

    @torch.no_grad()
    def accuracy(classifier: nn.Linear, scored: Features) -> float:
        return float((classifier(scored.features).argmax(dim=1) == scored.labels).float().mean())

    best, score = lrs[0], float("nan")
    if len(lrs) > 1:
        rows = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
        cut = max(1, round(held_out * len(rows)))
        chooser, learner = (
            Features(train.features[part], train.labels[part]) for part in (rows[:cut], rows[cut:])
        )
        scores = [accuracy(fit(learner, lr), chooser) for lr in lrs]
        score = max(scores)
        best = lrs[scores.index(score)]
    return LinearProbe(accuracy(fit(train, best), test), best, score)


def kmeans(train: Features, test: Features, k: int, restarts: int = 5, seed: int = 0) -> Tensor:
    """Fit scikit-learn's k-means on L2-normalised training features and return the clusters of the
    test images.

    Args:
        train: Features (n, d); labels are not read.
        test: Features (m, d); labels are not read.
        k: Clusters, at most n.
        restarts: Initialisations, of which the one with the smallest inertia is kept.
        seed: Of the initialisations.

    Returns:
        Clusters int64 (m,), on the CPU.

    Raises:
        ValueError: If a feature is not finite.

    Examples:
        >>> corners = Features(torch.eye(2).repeat(4, 1), torch.arange(2).repeat(4))
        >>> kmeans(corners, corners, k=2).bincount().tolist()
        [4, 4]
    """
    from sklearn.cluster import KMeans

    _check("train", train, labelled=False)
    _check("test", test, labelled=False)
    model = KMeans(n_clusters=k, n_init=restarts, random_state=seed)
    model.fit(normalize(train.features, dim=1).cpu().numpy())
    return torch.from_numpy(model.predict(normalize(test.features, dim=1).cpu().numpy())).long()


def clustering_scores(labels: Tensor, clusters: Tensor) -> dict[str, float]:
    """Return how well clusters agree with labels.

    Args:
        labels: Classes, int (n,); images below 0 are unlabelled and count in `in_use` only.
        clusters: Clusters, int (n,).

    Returns:
        `nmi`, `acc` (clusters matched one to one with classes), `purity` (each cluster counts for
        its commonest class), `ari`, and `in_use`, the number of clusters that hold an image.

    Examples:
        >>> clustering_scores(torch.tensor([0, 0, 1]), torch.tensor([5, 5, 2]))["acc"]
        1.0
    """
    from c2bin_ext import metrics

    pair = labels.cpu(), clusters.cpu()
    return {
        "nmi": metrics.normalized_mutual_information(*pair),
        "acc": metrics.clustering_accuracy(*pair),
        "purity": metrics.purity(*pair),
        "ari": metrics.adjusted_rand_index(*pair),
        "in_use": float(metrics.clusters_in_use(pair[1])),
    }
