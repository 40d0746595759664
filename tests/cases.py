"""Every public form of the losses in one table, which every concern's tests run over.

A row is a module, the inputs it takes, and what the oracle says of them. A concern that a row
cannot take part in is named in the row, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from oracle import rows
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from c2bin_ext import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    C2BINObjective,
    ClusterEntropyRegularizer,
    MultiScaleClusterHead,
    MultiScaleClusterLoss,
)

HEADS = (2, 5, 3)
FEATURES = 3

# The formulas as printed; `C2BINLoss.paper` adds Table 5's weights.
PRINTED: dict[str, Any] = {
    "similarity": "dot",
    "positive_in_denominator": False,
    "symmetric": False,
    "symmetric_alignment": False,
    "reduction": "sum",
}
TABLE_5: dict[str, Any] = {"cluster_weight": 2.0, "temperature": 0.5}
# Each option of the whole objective, away from its default.
OPTIONS: dict[str, Any] = {
    "cluster_weight": 0.3,
    "entropy_weight": 0.6,
    "temperature": 0.4,
    **PRINTED,
}


# Inputs ------------------------------------------------------------------------------------


def random_embeddings(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian embeddings (n, d)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def random_assignments(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Softmax rows (n, K), away from both uniform and one-hot."""
    return random_embeddings(n, k, seed).softmax(dim=1).to(dtype)


def one_hot(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Instance i in cluster i mod K: balanced when K divides n, dead clusters when K > n."""
    return torch.eye(k)[torch.arange(n) % k].to(dtype)


def uniform(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Every instance spread evenly over the clusters."""
    return torch.full((n, k), 1 / k, dtype=dtype)


def collapsed(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Every instance in cluster 0."""
    return one_hot(1, k, seed, dtype).repeat(n, 1)


def dead_cluster(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Softmax rows over all clusters but the last, which nobody chooses."""
    alive = random_assignments(n, k - 1, seed, dtype)
    return torch.cat([alive, alive.new_zeros(n, 1)], dim=1)


def zero_row(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Softmax rows, of which the first is zero."""
    return random_assignments(n, k, seed, dtype).index_fill(0, torch.tensor([0]), 0.0)


EXTREMES = (random_assignments, one_hot, uniform, collapsed, dead_cluster, zero_row)


@dataclass(frozen=True)
class Batch:
    """What inputs are drawn as: every tensor from a seed of its own."""

    n: int = 6
    dtype: torch.dtype = torch.float64
    heads: Sequence[int] = HEADS
    assignments: Callable[..., Tensor] = random_assignments
    seed: int = 0

    def embeddings(self, seed: int, d: int = 4) -> tuple[Tensor, Tensor]:
        first, second = (
            random_embeddings(self.n, d, self.seed + seed + view, self.dtype) for view in range(2)
        )
        return first, second

    def views(self, seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        first, second = (
            tuple(
                self.assignments(self.n, k, self.seed + seed + 10 * view + i, self.dtype)
                for i, k in enumerate(self.heads)
            )
            for view in range(2)
        )
        return first, second


def _alignment(batch: Batch) -> tuple[Any, ...]:
    return batch.embeddings(1)


def _contrast(batch: Batch) -> tuple[Any, ...]:
    return tuple(view[-1] for view in batch.views(100))


def _entropy(batch: Batch) -> tuple[Any, ...]:
    return (batch.views(100)[0][-1],)


def _clusters(batch: Batch) -> tuple[Any, ...]:
    return (batch.views(100),)


def _clusters_and_follower(batch: Batch) -> tuple[Any, ...]:
    return batch.views(100), batch.views(200)


def _objective(batch: Batch) -> tuple[Any, ...]:
    return batch.embeddings(1), batch.embeddings(3), batch.views(100)


def _objective_and_follower(batch: Batch) -> tuple[Any, ...]:
    return *_objective(batch), batch.views(200)


def _features(batch: Batch) -> tuple[Any, ...]:
    return batch.embeddings(1), batch.embeddings(3), batch.embeddings(5, FEATURES)


def _features_and_follower(batch: Batch) -> tuple[Any, ...]:
    return *_features(batch), batch.embeddings(7, FEATURES)


def _one_view(batch: Batch) -> tuple[Any, ...]:
    return (batch.embeddings(5, FEATURES)[0],)


# Ways of calling -----------------------------------------------------------------------------


class InMicroBatches(nn.Module):
    """A loss of the first instance and the rest as two micro-batches, as one call.

    Its value is that of the first micro-batch, its gradient the sum of both.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def outputs(self, *arguments: Any) -> list[Any]:
        parts = [tree_map(lambda t, s=s: t[s], arguments) for s in (slice(1), slice(1, None))]
        total = sum(self.loss.statistics(*part) for part in parts)
        return [self.loss(*part, statistics=total) for part in parts]

    def forward(self, *arguments: Any) -> Any:
        first, second = self.outputs(*arguments)
        return type(first)(
            *(one + (other - other.detach()) for one, other in zip(first, second, strict=True))
        )


def objective_module(**options: Any) -> nn.Module:
    """The objective with small heads, always the same."""
    torch.manual_seed(0)
    return C2BINObjective(FEATURES, HEADS, **options).double()


def head_module(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return MultiScaleClusterHead(FEATURES, HEADS, **options).double()


def evaluated(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The same in evaluation mode, with running statistics that are not the initial ones."""

    def built(**options: Any) -> nn.Module:
        module = build(**options)
        inputs = _features if hasattr(module, "loss") else _one_view
        for seed in range(3):
            module(*inputs(Batch(seed=seed)))
        return module.eval()

    return built


# The table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A row. `frozen` are the positions of arguments that get no gradient."""

    name: str
    make: Callable[..., nn.Module]
    inputs: Callable[[Batch], tuple[Any, ...]]
    oracle: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[int, ...] = ()
    micro: bool = False
    refuses: dict[str, str] = field(default_factory=dict)

    def build(self, **overrides: Any) -> nn.Module:
        loss = self.make(**{**self.options, **overrides})
        return InMicroBatches(loss) if self.micro else loss

    def arguments(self, n: int = 6, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
        return self.inputs(Batch(n, dtype, **more))

    def expected(self, module: nn.Module, arguments: Any) -> tuple[Tensor, list[Tensor]]:
        """Values, and gradients as `evaluate` returns them, by the oracle's loops."""
        numbers = tree_map(rows, arguments)
        head, fixed = (described(module) for _ in range(2))
        more: dict[str, Any] = {} if head is None else {"head": head}
        if head is not None and self.oracle is oracle.objective:
            more["target_head"] = fixed

        def value() -> float:
            return scalar(self.oracle(*numbers, **more, **self.oracle_options))

        values = flat(self.oracle(*numbers, **more, **self.oracle_options))
        gradients = []
        for position, argument in enumerate(numbers):
            for tensor, matrix in zip(
                tree_flatten(arguments[position])[0], _matrices(argument), strict=True
            ):
                none = [0.0] * tensor.numel()
                frozen = position in self.frozen
                found = none if frozen else oracle.finite_differences(value, matrix)
                gradients.append(torch.tensor(found, dtype=torch.float64).reshape(tensor.shape))
        for parameter in module.parameters():
            found = oracle.finite_differences(value, head["lists"][id(parameter)])
            gradients.append(torch.tensor(found, dtype=torch.float64).reshape(parameter.shape))
        return values, gradients

    @property
    def oracle_options(self) -> dict[str, Any]:
        layout = {"normalize", "hidden_features", "bias"}
        return {name: value for name, value in self.options.items() if name not in layout}

    @property
    def collectives(self) -> int:
        return 2 if self.micro else 1


def _matrices(tree: Any) -> list[Any]:
    """The matrices in nested sequences of them, in order."""
    if isinstance(tree, list) and isinstance(tree[0], list) and isinstance(tree[0][0], float):
        return [tree]
    return [matrix for branch in tree for matrix in _matrices(branch)]


def head_of(module: nn.Module) -> MultiScaleClusterHead | None:
    return next((m for m in module.modules() if isinstance(m, MultiScaleClusterHead)), None)


def described(module: nn.Module) -> dict[str, Any] | None:
    """The head of a module as the oracle takes it; `lists` are its parameters' numbers by id."""
    head = head_of(module)
    if head is None:
        return None
    lists: dict[int, Any] = {id(None): None}
    lists |= {id(parameter): rows(parameter) for parameter in head.parameters()}
    described = {
        "lists": lists,
        "weight": lists[id(head.linear.weight)],
        "bias": lists[id(head.linear.bias)],
        "clusters": head.num_clusters,
        "normalize": head.normalize,
        "hidden": None,
    }
    for layer in head.modules():
        if isinstance(layer, nn.Linear) and layer is not head.linear:
            described["hidden"] = {
                "weight": lists[id(layer.weight)],
                "bias": lists[id(layer.bias)],
            }
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm1d):
            described["hidden"] |= {
                "scale": lists[id(layer.weight)],
                "shift": lists[id(layer.bias)],
                "mean": rows(layer.running_mean),
                "variance": rows(layer.running_var),
                "eps": layer.eps,
                "training": layer.training,
            }
    return described


MICRO = {
    "second derivatives": "sums of the other micro-batches are constants, so what crosses them "
    "is missing from second derivatives",
    "n = 1": "one instance makes no two micro-batches",
}
BATCH_NORM = {
    "ranks": "batch norm takes its statistics of one rank's instances",
    "func": "batch norm updates its running statistics in place, which torch.func refuses",
    "n = 1": "batch norm has no variance of one instance",
}
HEAD = {
    "ranks": "a head takes no sums over instances",
    "validation": "a head takes no assignments",
}

CONTRASTS: dict[str, dict[str, Any]] = {
    f"contrast {similarity}, positive {positive}, {directions}": {
        "temperature": 0.3,
        "similarity": similarity,
        "positive_in_denominator": positive == "kept",
        "symmetric": directions == "both ways",
    }
    for similarity in ("cosine", "dot")
    for positive in ("kept", "left out")
    for directions in ("both ways", "one way")
} | {"contrast": {}, "contrast of a small temperature": {"temperature": 0.02}}


def paper(**options: Any) -> nn.Module:
    """`C2BINLoss.paper`, whose options a row spells out for the oracle's sake."""
    given = {n: v for n, v in options.items() if (PRINTED | TABLE_5).get(n) != v}
    return C2BINLoss.paper(**given)


def table() -> list[Case]:
    scale = {name: value for name, value in OPTIONS.items() if name not in ("cluster_weight",
             "symmetric_alignment")}  # fmt: skip
    clusters = partial(Case, make=MultiScaleClusterLoss, oracle=oracle.multi_scale)
    whole = partial(Case, make=C2BINLoss, oracle=oracle.total, frozen=(1, 3))
    printed = partial(whole, make=paper, options=PRINTED | TABLE_5)
    features = partial(Case, make=objective_module, oracle=oracle.objective, frozen=(1, 3))
    heads = partial(
        Case, make=head_module, inputs=_one_view, oracle=oracle.head_assignments, refuses=HEAD
    )
    micro: dict[str, Any] = {"micro": True, "refuses": MICRO}
    hidden = {"hidden_features": 4}
    return [
        Case("alignment", BootstrapAlignmentLoss, _alignment, oracle.alignment, frozen=(1,)),
        *[
            Case(name, BCAContrastiveLoss, _contrast, oracle.contrast, options)
            for name, options in CONTRASTS.items()
        ],
        *[
            Case(f"entropy {r}", ClusterEntropyRegularizer, _entropy, oracle.entropy_regularizer,
                 {"reduction": r})
            for r in ("mean", "sum")
        ],
        clusters("clusters", inputs=_clusters),
        clusters("clusters, every option", inputs=_clusters, options=scale),
        clusters("clusters and follower", inputs=_clusters_and_follower, frozen=(1,)),
        clusters("clusters and follower, every option", inputs=_clusters_and_follower,
                 options=scale, frozen=(1,)),
        whole("objective", inputs=_objective),
        *[
            whole(f"objective, {name} {value}", inputs=_objective, options={name: value})
            for name, value in OPTIONS.items()
        ],
        whole("objective, dot and sum", inputs=_objective,
              options={"similarity": "dot", "reduction": "sum", "temperature": 2.0}),
        whole("objective of a small temperature", inputs=_objective,
              options={"temperature": 0.02}),
        printed("paper", inputs=_objective),
        whole("objective and follower", inputs=_objective_and_follower),
        printed("paper and follower", inputs=_objective_and_follower),
        whole("objective in micro-batches", inputs=_objective, **micro),
        printed("paper in micro-batches", inputs=_objective, **micro),
        whole("objective and follower in micro-batches", inputs=_objective_and_follower, **micro),
        printed("paper and follower in micro-batches", inputs=_objective_and_follower, **micro),
        features("features and follower", inputs=_features_and_follower),
        features("features", inputs=_features),
        features("features and follower, paper", inputs=_features_and_follower,
                 options=PRINTED | TABLE_5 | {"normalize": False}),
        features("features and follower, hidden", inputs=_features_and_follower, options=hidden,
                 refuses=BATCH_NORM),
        features("features and follower, hidden, evaluated", make=evaluated(objective_module),
                 inputs=_features_and_follower, options=hidden),
        features("features in micro-batches", inputs=_features, **micro),
        features("features and follower in micro-batches", inputs=_features_and_follower, **micro),
        features("features and follower in micro-batches, hidden, evaluated",
                 make=evaluated(objective_module), inputs=_features_and_follower, options=hidden,
                 **micro),
        heads("head"),
        heads("head without bias", options={"bias": False}),
        heads("head, normalized", options={"normalize": True}),
        heads("head, hidden", options=hidden, refuses=HEAD | BATCH_NORM),
        heads("head, hidden, evaluated", make=evaluated(head_module),
              options=hidden | {"normalize": True}),
    ]  # fmt: skip


CASES = {case.name: case for case in table()}
ASSIGNED = [
    case
    for case in CASES.values()
    if case.inputs not in (_alignment, _features, _features_and_follower, _one_view)
]


def over(
    *concerns: str,
    cases: Sequence[Case] | None = None,
    where: Callable[[Case], bool] = lambda case: True,
) -> pytest.MarkDecorator:
    """Run a test over all rows; those that cannot take part are skipped with their reason."""
    params = []
    for case in CASES.values() if cases is None else cases:
        if where(case):
            reasons = [case.refuses[concern] for concern in concerns if concern in case.refuses]
            marks = [pytest.mark.skip(reason=reason) for reason in reasons]
            params.append(pytest.param(case, id=case.name, marks=marks))
    return pytest.mark.parametrize("case", params)


# What tests do with a row ---------------------------------------------------------------------


def scalar(output: Any) -> Any:
    """One number that depends on all that a module, or the oracle, returns."""
    if isinstance(output, (float, Tensor)):
        return output
    if hasattr(output, "loss") or isinstance(output[0], float):
        return output[0]
    if isinstance(output[0], Tensor):
        return sum((part**2).sum() for part in output)
    return sum(value**2 for matrix in output for row in matrix for value in row)


def flat(output: Any) -> Tensor:
    """All that a module, or the oracle, returns, in one vector."""
    parts = tree_flatten(output)[0]
    if isinstance(parts[0], Tensor):
        return torch.cat([part.reshape(-1) for part in parts])
    return torch.tensor(parts, dtype=torch.float64)


def leaves(tree: Any) -> tuple[Any, list[Tensor]]:
    """The same tensors as leaves that need a gradient, in their places and in a list."""
    live = tree_map(lambda tensor: tensor.detach().clone().requires_grad_(), tree)
    return live, tree_flatten(live)[0]


def evaluate(
    module: Callable[..., Any], arguments: Any, create_graph: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """All values, and the gradient of one number by every argument and parameter."""
    live, inputs = leaves(arguments)
    output = module(*live)
    if isinstance(module, nn.Module):
        inputs += module.parameters()
    found = torch.autograd.grad(
        scalar(output), inputs, allow_unused=True, create_graph=create_graph
    )
    gradients = [
        torch.zeros_like(tensor) if gradient is None else gradient.detach()
        for tensor, gradient in zip(inputs, found, strict=True)
    ]
    return flat(output).detach(), gradients


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Equal numbers of one shape, dtype and structure; plain numbers are taken as float64."""
    if isinstance(expected, float):
        expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
