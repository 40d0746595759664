"""Half precision, autocast and extreme inputs: finite, in the right dtype, and right."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import oracle
import pytest
import torch
from oracle import random_assignments, random_embeddings
from torch import Tensor

from c2bin_ext import MultiScaleClusterHead, functional

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HALVES = [torch.float16, torch.bfloat16]
CONTEXTS = ["plain", "autocast-bfloat16", "autocast-float16"]
CONTRASTS = [
    {"similarity": similarity, "positive_in_denominator": positive}
    for similarity in ("cosine", "dot")
    for positive in (True, False)
]


def zero_row(n: int, k: int, dtype: torch.dtype) -> Tensor:
    view = random_assignments(n, k, 0, dtype)
    view[0] = 0.0
    return view


EXTREMES = {
    "ordinary": lambda n, k, dtype: random_assignments(n, k, 0, dtype),
    "one-hot": oracle.one_hot,
    "uniform": oracle.uniform,
    "collapsed": oracle.collapsed,
    "dead-cluster": lambda n, k, dtype: oracle.dead_cluster(n, k, 0, dtype),
    "zero-row": zero_row,
}
SIZES = {"ordinary": (16, 4), "n=1": (1, 4), "K>n": (3, 40)}


def context(name: str) -> AbstractContextManager[Any]:
    if name == "plain":
        return nullcontext()
    return torch.autocast("cpu", dtype=getattr(torch, name.removeprefix("autocast-")))


def label(value: Any) -> str | None:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


def precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


def check(function: Any, tensors: tuple[Tensor, ...], where: str) -> None:
    """Finite value and gradients, float32 (or 64) loss, equal to the upcast computation."""
    dtype = tensors[0].dtype
    inputs = leaves(*tensors)
    with context(where):
        value = function(*inputs)
    assert value.dtype is precise(dtype)
    assert value.shape == ()
    assert torch.isfinite(value)

    upcast = leaves(*(tensor.to(precise(dtype)) for tensor in tensors))
    expected = function(*upcast)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)

    found = torch.autograd.grad(value, inputs)
    wanted = torch.autograd.grad(expected, upcast)
    for gradient, reference, tensor in zip(found, wanted, inputs, strict=True):
        assert gradient.dtype is tensor.dtype
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(reference).all()
        if dtype.itemsize > 2:
            torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", CONTEXTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestEveryDtype:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("options", CONTRASTS, ids=label)
    @pytest.mark.parametrize("extreme", EXTREMES)
    def test_contrast(
        self, extreme: str, options: dict[str, Any], size: str, dtype: torch.dtype, where: str
    ) -> None:
        view = EXTREMES[extreme](*SIZES[size], dtype)
        other = random_assignments(*SIZES[size], 7, dtype)

        def function(first: Tensor, second: Tensor) -> Tensor:
            return functional.bca_contrastive_loss(first, second, **options)

        check(function, (view, view), where)
        check(function, (view, other), where)
        check(function, (view, view.flip(1)), where)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("extreme", EXTREMES)
    def test_entropy(
        self, extreme: str, reduction: str, size: str, dtype: torch.dtype, where: str
    ) -> None:
        def function(assignments: Tensor) -> Tensor:
            return functional.cluster_entropy_regularizer(assignments, reduction=reduction)

        check(function, (EXTREMES[extreme](*SIZES[size], dtype),), where)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("zeros", ["none", "one row", "all"])
    def test_alignment(self, zeros: str, size: str, dtype: torch.dtype, where: str) -> None:
        prediction = random_embeddings(*SIZES[size], 1).to(dtype)
        target = random_embeddings(*SIZES[size], 2).to(dtype)
        if zeros == "one row":
            prediction[0] = 0.0
        elif zeros == "all":
            prediction, target = torch.zeros_like(prediction), torch.zeros_like(target)
        check(lambda p: functional.bootstrap_alignment_loss(p, target), (prediction,), where)
        check(
            lambda p: functional.bootstrap_alignment_loss(p, target.float()), (prediction,), where
        )

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("extreme", EXTREMES)
    def test_objective(self, extreme: str, reduction: str, dtype: torch.dtype, where: str) -> None:
        views = [EXTREMES[extreme](12, k, dtype) for k in (3, 4, 3, 4)]
        embeddings = [random_embeddings(12, 5, seed).to(dtype) for seed in range(4)]

        def function(*tensors: Tensor) -> Tensor:
            output = functional.c2bin_loss(
                tensors[:2],
                embeddings[2:],
                (tensors[2:4], tensors[4:6]),
                reduction=reduction,
            )
            assert {part.dtype for part in output} == {precise(dtype)}
            return output.loss

        check(function, (*embeddings[:2], *views), where)

    def test_mass(self, dtype: torch.dtype, where: str) -> None:
        assignments = random_assignments(12, 4, 0, dtype)
        with context(where):
            value = functional.cluster_mass(assignments)
        assert value.dtype is precise(dtype)
        torch.testing.assert_close(value, functional.cluster_mass(assignments.to(precise(dtype))))

    @pytest.mark.parametrize("scale", [1.0, 1e4])
    def test_assignments_of_huge_logits(self, scale: float, dtype: torch.dtype, where: str) -> None:
        (logits,) = leaves((random_embeddings(6, 7).clamp(-3, 3) * scale).to(dtype))
        with context(where):
            heads = functional.cluster_assignments(logits, (3, 4))
        expected = functional.cluster_assignments(logits.detach().to(precise(dtype)), (3, 4))
        for head, wanted in zip(heads, expected, strict=True):
            assert head.dtype is precise(dtype)
            torch.testing.assert_close(head.detach(), wanted)
        (gradient,) = torch.autograd.grad(sum((head**2).sum() for head in heads), logits)
        assert gradient.dtype is dtype
        assert torch.isfinite(gradient).all()

    @pytest.mark.parametrize("scale", [1.0, 1e4])
    def test_head(self, scale: float, dtype: torch.dtype, where: str) -> None:
        torch.manual_seed(0)
        head = MultiScaleClusterHead(5, (3, 40)).to(dtype)
        views = [(random_embeddings(6, 5, seed) * scale).clamp(-3e4, 3e4) for seed in (0, 1)]
        with context(where):
            assignments = [head(view.to(dtype)) for view in views]
            losses = [
                functional.bca_contrastive_loss(*pair)
                + functional.cluster_entropy_regularizer(pair[0])
                for pair in zip(*assignments, strict=True)
            ]
        for part in assignments[0]:
            assert part.dtype is precise(dtype)
            torch.testing.assert_close(part.sum(dim=1), torch.ones_like(part[:, 0]))
        loss = losses[0] + losses[1]
        assert torch.isfinite(loss)
        loss.backward()
        for parameter in head.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype is dtype
            assert torch.isfinite(parameter.grad).all()


class TestHalf:
    @pytest.mark.parametrize("options", CONTRASTS, ids=label)
    @pytest.mark.parametrize("entry", [6e-8, 1e-6, 1e-4])
    @pytest.mark.parametrize("rows", [1, 8])
    def test_near_dead_column_does_not_overflow(
        self, rows: int, entry: float, options: dict[str, Any]
    ) -> None:
        first = oracle.dead_cluster(rows, 4, 0, torch.float16)
        first[0, -1] = entry
        assert first[0, -1] > 0
        second = random_assignments(rows, 4, 1, torch.float16)
        second[:, 0] = 0.0
        second[-1, 0] = entry
        first, second = leaves(first, second)
        loss = functional.bca_contrastive_loss(first, second, **options)
        loss = loss + functional.cluster_entropy_regularizer(first, reduction="sum")
        for gradient in torch.autograd.grad(loss, (first, second)):
            assert gradient.dtype is torch.float16
            assert torch.isfinite(gradient).all()

    @pytest.mark.parametrize("entry", [6e-8, 1e-6, 1e-4])
    def test_near_zero_embedding_does_not_overflow(self, entry: float) -> None:
        prediction = random_embeddings(3, 4, 1).to(torch.float16)
        prediction[1] = 0.0
        prediction[1, 0] = entry
        (prediction,) = leaves(prediction)
        target = random_embeddings(3, 4, 2).to(torch.float16)
        value = functional.bootstrap_alignment_loss(prediction, target)
        (gradient,) = torch.autograd.grad(value, prediction)
        assert torch.isfinite(gradient).all()

    def test_large_embeddings_do_not_overflow(self) -> None:
        target = torch.full((2, 512), 6e4, dtype=torch.float16)
        value = functional.bootstrap_alignment_loss(target.clone().requires_grad_(), target)
        torch.testing.assert_close(value.detach(), torch.tensor(0.0), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_masses_beyond_the_largest_half(self, dtype: torch.dtype) -> None:
        view = oracle.collapsed(70_000, 2, dtype)
        assert functional.cluster_mass(view).tolist() == [70_000.0, 0.0]
        value = functional.cluster_entropy_regularizer(view)
        torch.testing.assert_close(value, torch.tensor(math.log(2)))
        total = functional.cluster_entropy_regularizer(view, reduction="sum")
        torch.testing.assert_close(total, torch.tensor(70_000 * math.log(2)))
        dot = functional.bca_contrastive_loss(view, view, similarity="dot")
        torch.testing.assert_close(dot, torch.tensor(math.log(2) / 2))

    @pytest.mark.parametrize("where", CONTEXTS)
    def test_autocast_is_left_as_it_was(self, where: str) -> None:
        view = random_assignments(4, 3, 0, torch.float32)
        with context(where):
            before = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            functional.bca_contrastive_loss(view, view)
            functional.cluster_entropy_regularizer(view)
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is before

    @pytest.mark.parametrize("where", CONTEXTS)
    def test_gradient_under_autocast_is_that_of_float32(self, where: str) -> None:
        tensors = [random_assignments(32, 5, seed, torch.float32) for seed in (0, 1)]
        found = leaves(*tensors)
        with context(where):
            functional.bca_contrastive_loss(*found, temperature=0.1).backward()
        wanted = leaves(*tensors)
        functional.bca_contrastive_loss(*wanted, temperature=0.1).backward()
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def large() -> tuple[Tensor, Tensor]:
    first = random_assignments(32_768, 8, 0, torch.float32)
    return first, random_assignments(32_768, 8, 1, torch.float32)


class TestLargeBatch:
    options: ClassVar[dict[str, Any]] = {"similarity": "dot", "temperature": 0.05}

    @pytest.mark.parametrize("positive", [True, False])
    def test_soft(self, large: tuple[Tensor, Tensor], positive: bool) -> None:
        inputs = leaves(*large)
        value = functional.bca_contrastive_loss(
            *inputs, positive_in_denominator=positive, **self.options
        )
        exact = functional.bca_contrastive_loss(
            *(view.double() for view in large),
            positive_in_denominator=positive,
            **self.options,
        )
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0.1)
        for gradient in torch.autograd.grad(value, inputs):
            assert torch.isfinite(gradient).all()

    def test_one_hot(self) -> None:
        (view,) = leaves(oracle.one_hot(32_768, 8, torch.float32))
        kept = functional.bca_contrastive_loss(view, view, **self.options)
        torch.testing.assert_close(kept.detach(), torch.tensor(0.0))
        left_out = functional.bca_contrastive_loss(
            view, view, positive_in_denominator=False, **self.options
        )
        expected = torch.tensor(math.log(7) - 4096 / 0.05)
        torch.testing.assert_close(left_out.detach(), expected)
        for value in (kept, left_out):
            (gradient,) = torch.autograd.grad(value, view)
            assert torch.isfinite(gradient).all()

    def test_collapsed(self) -> None:
        (view,) = leaves(oracle.collapsed(32_768, 8, torch.float32))
        value = functional.bca_contrastive_loss(view, view, **self.options)
        torch.testing.assert_close(value.detach(), torch.tensor(7 / 8 * math.log(8)))
        (gradient,) = torch.autograd.grad(value, view)
        assert torch.isfinite(gradient).all()

    def test_cosine_of_the_large_batch(self, large: tuple[Tensor, Tensor]) -> None:
        value = functional.bca_contrastive_loss(*large)
        exact = functional.bca_contrastive_loss(*(view.double() for view in large))
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


class TestSinglePrecisionExtremes:
    @pytest.mark.parametrize("entry", [1e-45, 1e-38, 1e-20])
    def test_near_dead_column(self, entry: float) -> None:
        first = oracle.dead_cluster(5, 4, 0, torch.float32)
        first[0, -1] = entry
        (first,) = leaves(first)
        second = random_assignments(5, 4, 1, torch.float32)
        value = functional.bca_contrastive_loss(
            first, second
        ) + functional.cluster_entropy_regularizer(first)
        (gradient,) = torch.autograd.grad(value, first)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()

    def test_tiny_column_keeps_its_direction(self) -> None:
        first = random_assignments(6, 3, 0, torch.float32)
        second = random_assignments(6, 3, 1, torch.float32)
        scales = torch.tensor([1.0, 1e-12, 1e-6])
        value = functional.bca_contrastive_loss(first * scales, second)
        torch.testing.assert_close(
            value, functional.bca_contrastive_loss(first, second), rtol=1e-5, atol=1e-5
        )

    @pytest.mark.parametrize("options", CONTRASTS, ids=label)
    @pytest.mark.parametrize("temperature", [1e-3, 1e3])
    def test_extreme_temperatures(self, temperature: float, options: dict[str, Any]) -> None:
        inputs = leaves(*(random_assignments(9, 4, s, torch.float32) for s in (0, 1)))
        value = functional.bca_contrastive_loss(*inputs, temperature=temperature, **options)
        exact = functional.bca_contrastive_loss(
            *(view.detach().double() for view in inputs), temperature=temperature, **options
        )
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-4)
        for gradient in torch.autograd.grad(value, inputs):
            assert torch.isfinite(gradient).all()

    @pytest.mark.parametrize("k", [2, 128, 2048])
    def test_entropy_is_never_negative(self, k: int) -> None:
        for seed in range(20):
            noise = random_embeddings(64, k, seed, torch.float32)
            value = functional.cluster_entropy_regularizer((1e-3 * noise).softmax(dim=1))
            assert value.item() >= 0

    def test_entropy_near_balance_keeps_its_digits(self) -> None:
        assignments = random_assignments(4096, 128, 0, torch.float32)
        value = functional.cluster_entropy_regularizer(assignments)
        exact = functional.cluster_entropy_regularizer(assignments.double())
        torch.testing.assert_close(value.double(), exact, rtol=1e-2, atol=1e-6)
