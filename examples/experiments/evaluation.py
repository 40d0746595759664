"""Scores of frozen features: lightly's kNN, a linear probe in lightly's recipe, and k-means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from lightly.utils.benchmarking import knn_predict
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from c2bin_ext import metrics


class Features(NamedTuple):
    """Features (n, d) of n images and their labels (n,)."""

    features: Tensor
    labels: Tensor


class LinearProbe(NamedTuple):
    """Test accuracy in [0, 1], the chosen learning rate, its accuracy on held-out images."""

    accuracy: float
    lr: float
    held_out_accuracy: float


def check(**given: Features) -> None:
    """Refuse what cannot be scored, by the name of its argument: a ValueError."""
    columns = {part.features.shape[1:] for part in given.values()}
    if len(columns) > 1:
        shapes = ", ".join(f"{n} {tuple(part.features.shape)}" for n, part in given.items())
        raise ValueError(f"expected features of one length d, got {shapes}")
    for name, (features, labels) in given.items():
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"{name}: expected features (n, d) and labels (n,), got shapes "
                f"{tuple(features.shape)} and {tuple(labels.shape)}"
            )
        if not len(features):
            raise ValueError(f"{name}: expected at least one image, got none")
        bad = int((~features.isfinite()).sum())
        if bad:
            raise ValueError(f"{name}: expected finite features, got {bad} NaN or infinite entries")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"{name}: expected integer labels, got {labels.dtype}")
        bad = int((labels < 0).sum())
        if bad:
            raise ValueError(
                f"{name}: expected labels of at least 0, got {bad} below: leave unlabelled images "
                "out"
            )


@torch.no_grad()
def extract(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    transform: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Features:
    """Return the features of a model in evaluation mode; the model's mode is put back afterwards.

    `model` maps images (n, channels, height, width) to features that flatten to (n, d); `batches`
    yields `(images, labels, ...)` without augmentation, in a fixed order; `transform` is applied to
    images on the device, by default that of the model's first parameter.
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
        raise ValueError("batches: expected at least one, got none")
    return Features(torch.cat(features), torch.cat(labels))


def lightly_knn(
    train: Features, test: Features, k: int, temperature: float = 0.1, chunk: int = 512
) -> float:
    """Return the accuracy of lightly's weighted kNN on L2-normalised features.

    Its ties fall as they come; `c2bin_ext.metrics.knn_accuracy` shares them out.

    Args:
        train: The bank: features (n, d) and labels (n,).
        test: What to classify: features (m, d) and labels (m,).
        k: Neighbours. More than the bank holds means all of it: k is cut to n.
        temperature: A neighbour of cosine s votes with weight exp(s / temperature).
        chunk: Test rows compared at a time, which bounds memory.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    check(train=train, test=test)
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
    """
    if not lrs:
        raise ValueError("lrs: expected at least one learning rate, got none")
    check(train=train, test=test)
    if len(lrs) > 1 and len(train.labels) < 2:
        raise ValueError("train: expected two images at least, one to hold out, got 1")
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


def _unlabelled(part: Features) -> Features:
    return Features(part.features, torch.zeros(len(part.features), dtype=torch.long))


def kmeans(train: Features, test: Features, k: int, restarts: int = 5, seed: int = 0) -> Tensor:
    """Fit scikit-learn's k-means on L2-normalised training features; return the test clusters.

    Labels are not read. Of `restarts` initialisations the one with the smallest inertia is kept.
    """
    from sklearn.cluster import KMeans

    check(train=_unlabelled(train), test=_unlabelled(test))
    if not 1 <= k <= len(train.features):
        raise ValueError(f"k: expected 1 to {len(train.features)}, the training images, got {k}")
    model = KMeans(n_clusters=k, n_init=restarts, random_state=seed)
    model.fit(normalize(train.features, dim=1).cpu().numpy())
    return torch.from_numpy(model.predict(normalize(test.features, dim=1).cpu().numpy())).long()


def cluster_scores(labels: Tensor, assignments: Tensor) -> dict[str, float]:
    """Return how well clusters agree with labels, named as `c2bin_ext.monitoring` names them.

    Args:
        labels: Classes, int (n,).
        assignments: Clusters, int (n,), or assignments (n, K), whose largest is the cluster.

    Returns:
        `nmi`, `acc` (clusters matched one to one with classes), `purity` (each cluster counts for
        its commonest class), `ari`, `clusters_in_use` (those that hold an image) and
        `effective_clusters` (exp of the entropy of the mean assignment).
    """
    if assignments.ndim == 1:
        assignments = one_hot(assignments).double()
    labels, assignments = labels.cpu(), assignments.cpu()
    clusters = assignments.argmax(dim=1)
    return {
        "nmi": metrics.normalized_mutual_information(labels, clusters),
        "acc": metrics.clustering_accuracy(labels, clusters),
        "purity": metrics.purity(labels, clusters),
        "ari": metrics.adjusted_rand_index(labels, clusters),
        "clusters_in_use": float(metrics.clusters_in_use(clusters)),
        "effective_clusters": metrics.effective_clusters(assignments),
    }
