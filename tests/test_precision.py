"""Half precision, autocast and extreme inputs: finite, in the right dtype, and right."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from cases import (
    ASSIGNED,
    CONTRASTS,
    EXTREMES,
    Case,
    close,
    collapsed,
    dead_cluster,
    evaluate,
    flat,
    leaves,
    one_hot,
    over,
    random_assignments,
    random_embeddings,
    scalar,
)
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from c2bin_ext import MultiScaleClusterHead
from c2bin_ext.functional import (
    bca_contrastive_loss,
    bootstrap_alignment_loss,
    cluster_assignments,
    cluster_entropy_regularizer,
    cluster_mass,
)

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32, torch.float64]
CONTEXTS = ["plain", "autocast-bfloat16", "autocast-float16"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
contexts = pytest.mark.parametrize("where", CONTEXTS)
contrasts = pytest.mark.parametrize("options", CONTRASTS.values(), ids=CONTRASTS)
# Of these, float32 is far from float64 already: scores are divided by 0.02.
TOLERANCE = 2e-4


def context(name: str) -> AbstractContextManager[Any]:
    if name == "plain":
        return nullcontext()
    return torch.autocast("cpu", dtype=getattr(torch, name.removeprefix("autocast-")))


def precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def upcast(tree: Any) -> Any:
    return tree_map(lambda t: t.to(precise(t.dtype)), tree)


class TestEveryForm:
    @contexts
    @dtypes
    @over()
    def test_is_computed_in_float32_at_least(
        self, case: Case, dtype: torch.dtype, where: str
    ) -> None:
        """Inputs and parameters of any dtype, in and out of autocast, against the upcast ones."""
        module, arguments = case.build().to(dtype), case.arguments(dtype=dtype)
        reference = copy.deepcopy(module).to(precise(dtype))
        live, inputs = leaves(arguments)
        inputs += module.parameters()
        with context(where):
            output = module(*live)
        assert {part.dtype for part in tree_flatten(output)[0]} == {precise(dtype)}
        values, expected = evaluate(reference, upcast(arguments))
        close(flat(output).detach(), values, 1e-5)
        found = torch.autograd.grad(scalar(output), inputs, allow_unused=True)
        for gradient, wanted, leaf in zip(found, expected, inputs, strict=True):
            if gradient is None:
                assert not wanted.any()
                continue
            assert gradient.dtype is leaf.dtype
            tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, TOLERANCE)
            scale = max(1.0, float(wanted.abs().max()))
            close(gradient.to(wanted.dtype) / scale, wanted / scale, tolerance)

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @over(where=lambda case: list(case.build().parameters()) != [])
    def test_half_features_of_a_float32_head_under_autocast(
        self, case: Case, dtype: torch.dtype
    ) -> None:
        """What a backbone under autocast hands to the head."""
        module, arguments = case.build().float(), case.arguments(dtype=dtype)
        expected = flat(copy.deepcopy(module)(*upcast(arguments))).detach()
        with torch.autocast("cpu", dtype=dtype):
            found = flat(module(*arguments))
        assert found.dtype is torch.float32
        close(found.detach(), expected, 1e-5)

    @over()
    def test_float64_stays_exact_under_autocast(self, case: Case) -> None:
        module, arguments = case.build(), case.arguments()
        expected = evaluate(copy.deepcopy(module), arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = evaluate(module, arguments)
        close(found, expected, 1e-13)

    @pytest.mark.parametrize("extreme", EXTREMES, ids=lambda extreme: extreme.__name__)
    @over(cases=ASSIGNED)
    def test_extremes_are_finite(self, case: Case, extreme: Callable[..., Tensor]) -> None:
        for dtype in DTYPES[:3]:
            for n, heads in ((1, (4,)), (3, (40,)), (16, (4, 2))):
                if n == 1 and "n = 1" in case.refuses:
                    continue
                module = case.build().float()
                arguments = case.arguments(n, dtype, assignments=extreme, heads=heads)
                values, gradients = evaluate(module, arguments)
                close(values, evaluate(module, upcast(arguments))[0], 1e-5)
                assert torch.isfinite(values).all()
                for gradient in gradients:
                    assert torch.isfinite(gradient).all()

    @over("n = 1", where=lambda case: not case.name.startswith(("contrast", "entropy", "cluster")))
    def test_zero_vectors_are_finite(self, case: Case) -> None:
        for dtype in DTYPES[:3]:
            for n in (1, 3):
                arguments = tree_map(
                    lambda t: t if t.min() >= 0 else t * 0, case.arguments(n, dtype)
                )
                values, gradients = evaluate(case.build().float(), arguments)
                assert torch.isfinite(values).all()
                for gradient in gradients:
                    assert torch.isfinite(gradient).all()

    @over()
    def test_autocast_is_left_as_it_was(self, case: Case) -> None:
        module, arguments = case.build(), case.arguments()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            evaluate(module, arguments)
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
        evaluate(module, arguments)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


class TestFunctions:
    @contexts
    @dtypes
    def test_mass(self, dtype: torch.dtype, where: str) -> None:
        assignments = random_assignments(12, 4, 0, dtype)
        with context(where):
            value = cluster_mass(assignments)
        close(value, cluster_mass(upcast(assignments)), 0)

    @contexts
    @dtypes
    @pytest.mark.parametrize("scale", [1.0, 1e4])
    def test_assignments_of_huge_logits(self, scale: float, dtype: torch.dtype, where: str) -> None:
        logits = (random_embeddings(6, 7).clamp(-3, 3) * scale).to(dtype).requires_grad_()
        with context(where):
            heads = cluster_assignments(logits, (3, 4))
        close(heads, cluster_assignments(upcast(logits.detach()), (3, 4)), 1e-6)
        (gradient,) = torch.autograd.grad(sum((head**2).sum() for head in heads), logits)
        assert gradient.dtype is dtype
        assert torch.isfinite(gradient).all()

    @contexts
    @dtypes
    def test_head_of_huge_features(self, dtype: torch.dtype, where: str) -> None:
        head = MultiScaleClusterHead(5, (3, 40)).to(dtype)
        features = (1e4 * random_embeddings(6, 5)).clamp(-3e4, 3e4).to(dtype)
        with context(where):
            assignments = head(features)
            loss: Any = sum(cluster_entropy_regularizer(part) for part in assignments)
            loss = loss + sum(bca_contrastive_loss(part, part.flip(1)) for part in assignments)
        for part in assignments:
            close(part.sum(dim=1), torch.ones_like(part[:, 0]), 1e-5)
        loss.backward()
        for parameter in head.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype is dtype
            assert torch.isfinite(parameter.grad).all()


class TestHalf:
    # At τ = 0.02 the gradient itself, 1 / (τ ‖c‖), is beyond float16.
    @pytest.mark.parametrize("name", [name for name in CONTRASTS if "small" not in name])
    @pytest.mark.parametrize("entry", [6e-8, 1e-6, 1e-4])
    @pytest.mark.parametrize("n", [1, 8])
    def test_near_dead_column_does_not_overflow(self, n: int, entry: float, name: str) -> None:
        first, second = dead_cluster(n, 4, 0, torch.float16), random_assignments(n, 4, 1)
        first[0, -1] = entry
        assert first[0, -1] > 0
        second[:, 0] = 0.0
        second[-1, 0] = entry
        pair = [first.requires_grad_(), second.half().requires_grad_()]
        loss = bca_contrastive_loss(*pair, **CONTRASTS[name])
        loss = loss + cluster_entropy_regularizer(pair[0], reduction="sum")
        for gradient in torch.autograd.grad(loss, pair):
            assert gradient.dtype is torch.float16
            assert torch.isfinite(gradient).all()

    @pytest.mark.parametrize("entry", [6e-8, 1e-6, 1e-4])
    def test_near_zero_embedding_does_not_overflow(self, entry: float) -> None:
        prediction, target = (random_embeddings(3, 4, s, torch.float16) for s in (1, 2))
        prediction[1] = 0.0
        prediction[1, 0] = entry
        prediction.requires_grad_()
        (gradient,) = torch.autograd.grad(bootstrap_alignment_loss(prediction, target), prediction)
        assert torch.isfinite(gradient).all()

    def test_large_embeddings_do_not_overflow(self) -> None:
        target = torch.full((2, 512), 6e4, dtype=torch.float16)
        close(bootstrap_alignment_loss(target, target), torch.tensor(0.0), 1e-6)

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_masses_beyond_the_largest_half(self, dtype: torch.dtype) -> None:
        view = collapsed(70_000, 2, 0, dtype)
        assert cluster_mass(view).tolist() == [70_000.0, 0.0]
        close(cluster_entropy_regularizer(view), torch.tensor(math.log(2)), 1e-6)
        total = cluster_entropy_regularizer(view, reduction="sum")
        close(total, torch.tensor(70_000 * math.log(2)), 1e-6)
        dot = bca_contrastive_loss(view, view, similarity="dot")
        close(dot, torch.tensor(math.log(2) / 2), 1e-6)

    @pytest.mark.parametrize("hidden", [None, 7])
    def test_head_computes_in_the_wider_dtype(self, hidden: int | None) -> None:
        head = MultiScaleClusterHead(5, (2, 4), normalize=True, hidden_features=hidden).eval()
        features = random_embeddings(6, 5, 0)
        exact = copy.deepcopy(head).double()
        for found in (head(features), exact(features.float())):
            for part, wanted in zip(found, exact(features), strict=True):
                assert part.dtype is torch.float64
                close(part, wanted, 1e-6)
        close(head(features), exact(features))

    def test_each_view_has_the_floor_of_its_own_dtype(self) -> None:
        """A column (or a row) of 1e-6 is empty in float16 and has a direction in float32."""
        full = torch.full((4, 3), 1 / 3)
        short = full.clone()
        short[:, 0] = 1e-6
        for pair in ((short.half(), full), (full, short.half())):
            emptied = [x.float().where(x > 1e-4, 0) for x in pair]
            close(bca_contrastive_loss(*pair), bca_contrastive_loss(*emptied), 1e-3)
        for pair in ((short, full.half()), (full.half(), short)):
            close(bca_contrastive_loss(*pair), torch.tensor(3.0).log(), 1e-3)
        tiny, one = torch.full((2, 3), 1e-6), torch.ones(2, 3)
        for pair, expected in (
            ((tiny.half(), one), 1.0),
            ((one, tiny.half()), 1.0),
            ((tiny, one.half()), 0.0),
            ((one.half(), tiny), 0.0),
        ):
            close(bootstrap_alignment_loss(*pair), torch.tensor(expected), 1e-5)


@pytest.fixture(scope="module")
def large() -> list[Tensor]:
    return [random_assignments(32_768, 8, seed, torch.float32) for seed in (0, 1)]


class TestLargeBatch:
    options = {"similarity": "dot", "temperature": 0.05}  # noqa: RUF012

    @pytest.mark.parametrize("positive", [True, False])
    def test_soft(self, large: list[Tensor], positive: bool) -> None:
        options = self.options | {"positive_in_denominator": positive}
        inputs = [view.clone().requires_grad_() for view in large]
        value = bca_contrastive_loss(*inputs, **options)
        exact = bca_contrastive_loss(*(view.double() for view in large), **options)
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0.1)
        for gradient in torch.autograd.grad(value, inputs):
            assert torch.isfinite(gradient).all()

    def test_one_hot(self) -> None:
        view = one_hot(32_768, 8, 0, torch.float32).requires_grad_()
        kept = bca_contrastive_loss(view, view, **self.options)
        close(kept.detach(), torch.tensor(0.0), 1e-5)
        left = bca_contrastive_loss(view, view, positive_in_denominator=False, **self.options)
        close(left.detach(), torch.tensor(math.log(7) - 4096 / 0.05), 1e-6)
        for value in (kept, left):
            assert torch.isfinite(torch.autograd.grad(value, view)[0]).all()

    def test_collapsed(self) -> None:
        view = collapsed(32_768, 8, 0, torch.float32).requires_grad_()
        value = bca_contrastive_loss(view, view, **self.options)
        close(value.detach(), torch.tensor(7 / 8 * math.log(8)), 1e-5)
        assert torch.isfinite(torch.autograd.grad(value, view)[0]).all()

    def test_cosine_of_the_large_batch(self, large: list[Tensor]) -> None:
        exact = bca_contrastive_loss(*(view.double() for view in large))
        close(bca_contrastive_loss(*large).double(), exact, 1e-5)


class TestSinglePrecisionExtremes:
    @pytest.mark.parametrize("entry", [1e-45, 1e-38, 1e-20])
    def test_near_dead_column(self, entry: float) -> None:
        first = dead_cluster(5, 4, 0, torch.float32)
        first[0, -1] = entry
        first.requires_grad_()
        value = bca_contrastive_loss(first, random_assignments(5, 4, 1, torch.float32))
        value = value + cluster_entropy_regularizer(first)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, first)[0]).all()

    def test_tiny_column_keeps_its_direction(self) -> None:
        first, second = (random_assignments(6, 3, seed, torch.float32) for seed in (0, 1))
        scaled = bca_contrastive_loss(first * torch.tensor([1.0, 1e-12, 1e-6]), second)
        close(scaled, bca_contrastive_loss(first, second), 1e-5)

    def test_short_column_of_float16_keeps_its_direction(self) -> None:
        first, second = (random_assignments(6, 3, seed, torch.float32) for seed in (0, 1))
        scaled = bca_contrastive_loss((first * torch.tensor([1.0, 1e-3, 1.0])).half(), second)
        close(scaled, bca_contrastive_loss(first, second), 1e-2)

    @contrasts
    @pytest.mark.parametrize("temperature", [1e-3, 1e3])
    def test_extreme_temperatures(self, temperature: float, options: dict[str, Any]) -> None:
        options = options | {"temperature": temperature}
        inputs = [random_assignments(9, 4, s, torch.float32).requires_grad_() for s in (0, 1)]
        value = bca_contrastive_loss(*inputs, **options)
        exact = bca_contrastive_loss(*(view.detach().double() for view in inputs), **options)
        close(value.detach().double(), exact, 1e-4)
        for gradient in torch.autograd.grad(value, inputs):
            assert torch.isfinite(gradient).all()

    @pytest.mark.parametrize("k", [2, 128, 2048])
    def test_entropy_is_never_negative(self, k: int) -> None:
        for seed in range(20):
            noise = random_embeddings(64, k, seed, torch.float32)
            assert cluster_entropy_regularizer((1e-3 * noise).softmax(dim=1)) >= 0

    def test_entropy_near_balance_keeps_its_digits(self) -> None:
        assignments = random_assignments(4096, 128, 0, torch.float32)
        value = cluster_entropy_regularizer(assignments)
        exact = cluster_entropy_regularizer(assignments.double())
        torch.testing.assert_close(value.double(), exact, rtol=1e-2, atol=1e-6)
