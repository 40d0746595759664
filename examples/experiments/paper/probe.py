"""The paper's linear evaluation, Table 6: LARS at five constant learning rates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightly.utils.lars import LARS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.evaluation import Features, check

LEARNING_RATES = (0.1, 0.2, 0.3, 0.4, 0.5)


def linear_evaluation(
    train: Features,
    test: Features,
    epochs: int,
    rates: Sequence[float] = LEARNING_RATES,
    batch_size: int = 256,
    seed: int = 0,
) -> list[float]:
    """Return the test accuracy of one linear classifier per learning rate.

    The classifiers see the same batches at once, which costs little more than one: their losses are
    summed, so that each gets its own gradient alone.

    Args:
        train: Features (n, d) and labels (n,).
        test: Features (m, d) and labels (m,).
        epochs: Passes over the training features; Table 6 has 300.
        rates: Learning rates, constant over the run.
        batch_size: Rows of a batch.
        seed: Of weights and order; the global generators are left alone.

    Returns:
        Accuracies in [0, 1]. The paper reports the largest, so the TEST images choose the rate.

    Raises:
        ValueError: If a part is empty, features are not finite, or an image is unlabelled.
    """
    check(train=train, test=test)
    device, rows = train.features.device, len(train.labels)
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Linear(train.features.shape[1], classes).to(device)
    weights: list[Tensor] = [nn.Parameter(first.weight.detach().clone()) for _ in rates]
    biases: list[Tensor] = [nn.Parameter(first.bias.detach().clone()) for _ in rates]
    optimizer = LARS(
        [
            {"params": [parameter], "lr": rate, "weight_decay": decay}
            # lightly's LARS takes a weight decay of 0 to mean no layer-wise scaling either.
            for parameters, decay in ((weights, 1e-6), (biases, 0.0))
            for parameter, rate in zip(parameters, rates, strict=True)
        ],
        lr=rates[0],
        momentum=0.9,
    )

    def logits(features: Tensor) -> list[Tensor]:
        together = features @ torch.cat(weights).t() + torch.cat(biases)
        return list(together.split(classes, dim=1))

    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        shuffled = torch.randperm(rows, generator=order).to(device)
        for batch in shuffled.split(batch_size):
            optimizer.zero_grad()
            labels = train.labels[batch]
            losses = [cross_entropy(each, labels) for each in logits(train.features[batch])]
            torch.stack(losses).sum().backward()
            optimizer.step()
    with torch.no_grad():
        guesses = [each.argmax(dim=1) for each in logits(test.features)]
    return [float((guess == test.labels).float().mean()) for guess in guesses]
