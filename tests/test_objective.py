"""Heads and loss in one module: features in, loss out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    CASES,
    FEATURES,
    HEADS,
    OPTIONS,
    close,
    objective_module,
    random_embeddings,
)
from helpers import signature

from c2bin_ext import C2BINLoss, C2BINLossOutput, C2BINObjective, MultiScaleClusterHead


def inputs(n: int = 6) -> tuple[Any, ...]:
    return CASES["features and follower"].arguments(n)


def test_signature() -> None:
    known = dict(signature(C2BINObjective))
    assert list(known)[:4] == ["in_features", "num_clusters", "normalize", "hidden_features"]
    assert (known["num_clusters"], known["normalize"], known["hidden_features"]) == (
        (32, 64, 128),
        True,
        None,
    )
    assert list(known)[4:] == [*(name for name, _ in signature(C2BINLoss)), "bias"]
    assert {name: known[name] for name, _ in signature(C2BINLoss)} == dict(signature(C2BINLoss))


@pytest.mark.parametrize(("name", "value"), [*OPTIONS.items(), ("gather_distributed", True),
                                             ("validate_args", True)])  # fmt: skip
def test_options_reach_the_loss(name: str, value: Any) -> None:
    objective = C2BINObjective(4, (2,), **{name: value})
    assert type(objective.loss) is C2BINLoss
    assert getattr(objective.loss, name) == value


def test_layout_reaches_the_head() -> None:
    head = C2BINObjective(4, (2, 5), normalize=False, hidden_features=7).head
    assert type(head) is MultiScaleClusterHead
    assert (head.in_features, head.num_clusters, head.normalize) == (4, (2, 5), False)
    assert head.linear.weight.shape == (7, 7)
    assert C2BINObjective(4).head.normalize is True


@pytest.mark.parametrize("follower", [True, False])
def test_is_the_loss_of_its_heads(follower: bool) -> None:
    objective = objective_module()
    predictions, targets, features, fixed = inputs()
    heads = tuple(map(objective.head, features))
    fixed_heads = tuple(map(objective.head, fixed)) if follower else None
    output = objective(predictions, targets, features, fixed if follower else None)
    assert type(output) is C2BINLossOutput
    close(output, objective.loss(predictions, targets, heads, fixed_heads))
    close(
        objective.statistics(predictions, targets, features, fixed if follower else None),
        objective.loss.statistics(predictions, targets, heads, fixed_heads),
    )


def test_by_keyword() -> None:
    objective, given = objective_module(), inputs()
    names = ("predictions", "targets", "features", "target_features")
    close(objective(**dict(zip(names, given, strict=True))), objective(*given), 0)


def test_only_the_head_has_parameters() -> None:
    names = [name for name, _ in objective_module().named_parameters()]
    assert names == ["head.linear.weight", "head.linear.bias"]


def test_the_follower_s_features_train_nothing() -> None:
    """Neither they nor the head through them: the head's gradient is the runner's."""
    objective = objective_module()
    predictions, targets, features, fixed = inputs()
    live = tuple(f.clone().requires_grad_() for f in fixed)
    output = objective(predictions, targets, features, live)
    parameters = list(objective.parameters())
    found = torch.autograd.grad(output.loss, [*parameters, *live], allow_unused=True)
    assert all(gradient is None for gradient in found[2:])
    heads = tuple(map(objective.head, features))
    with torch.no_grad():
        fixed_heads = tuple(map(objective.head, fixed))
    expected = objective.loss(predictions, targets, heads, fixed_heads).loss
    close(list(found[:2]), list(torch.autograd.grad(expected, parameters)))


def test_a_statistics_pass_records_no_gradient() -> None:
    objective = objective_module()
    assert not objective.statistics(*inputs()).requires_grad
    (first, _), *_ = inputs()
    live = first.clone().requires_grad_()
    given = (live, live), (live, live), (live[:, :FEATURES], live[:, :FEATURES])
    assert not objective.statistics(*given).requires_grad


def test_training_lowers_the_loss() -> None:
    objective = objective_module()
    predictions, targets, features, fixed = inputs(24)
    given = (predictions, targets, features, tuple(f + 0.1 * g for f, g in
             zip(features[::-1], fixed, strict=True)))  # fmt: skip
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = objective(*given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


class TestErrors:
    @pytest.mark.parametrize("name", ["features", "target_features"])
    def test_not_a_pair(self, name: str, complains: Any) -> None:
        objective, given = objective_module(), list(inputs())
        position = {"features": 2, "target_features": 3}[name]
        for wrong, kind, part in ((torch.rand(2, 6, 3), TypeError, "Tensor"),
                                  ((given[2][0],), ValueError, "1")):  # fmt: skip
            with complains(kind, f"{name}: expected a pair", part):
                objective(*given[:position], wrong, *given[position + 1 :])

    def test_width(self, complains: Any) -> None:
        objective, given = objective_module(), list(inputs())
        given[2] = tuple(random_embeddings(6, 5, seed) for seed in (1, 2))
        with complains(ValueError, "features", "6, 5", "3"):
            objective(*given)

    def test_other_numbers_of_instances(self, complains: Any) -> None:
        objective, given = objective_module(), list(inputs())
        given[2] = tuple(view[:4] for view in given[2])
        with complains(ValueError, ("features", "assignments"), "6", "4"):
            objective(*given)

    @pytest.mark.parametrize(("name", "value", "kind"), [
        ("temperature", 0, ValueError), ("cluster_weight", -1, ValueError),
        ("num_clusters", (1,), ValueError), ("hidden_features", 0, ValueError),
        ("normalize", 1, TypeError), ("symmetric", 1, TypeError),
    ])  # fmt: skip
    def test_options(self, name: str, value: Any, kind: Any, complains: Any) -> None:
        with complains(kind, name):
            C2BINObjective(4, **{"num_clusters": HEADS, name: value})

    def test_validate_args(self, complains: Any) -> None:
        given = list(inputs())
        given[0] = (given[0][0], torch.full_like(given[0][1], torch.inf))
        assert not torch.isfinite(objective_module()(*given).loss)
        with complains(ValueError, "predictions[1]", "finite"):
            objective_module(validate_args=True)(*given)


def test_repr_shows_head_and_loss() -> None:
    text = repr(C2BINObjective(4, (2, 5), temperature=0.3))
    for part in ("in_features=4", "num_clusters=(2, 5)", "normalize=True", "temperature=0.3"):
        assert part in text


def test_graphs_are_recorded_of_the_runner_only() -> None:
    objective, (*aligned, features, fixed), recorded = objective_module(), inputs(), []
    objective.head.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    objective(*aligned, features, target_features=fixed)
    assert recorded == [True, True, False, False]
    recorded.clear()
    objective.statistics(*aligned, features, fixed)
    assert recorded == [False] * 4
