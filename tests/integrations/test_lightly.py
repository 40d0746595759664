"""c2bin_lightly: what each method trains, how the follower moves, two processes, checkpoints."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

pytest.importorskip("lightly")

from c2bin_lightly import BYOL, C2BIN, MoCoV2, SimCLR
from pytorch_lightning import Callback, LightningModule, Trainer

from c2bin_ext import C2BINLoss
from c2bin_ext.functional import bca_contrastive_loss

# Lightning's own calls of what torch and the operating system are about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]

METHODS = (SimCLR, MoCoV2, BYOL, C2BIN)
OPTIONS: dict[type[LightningModule], dict[str, Any]] = {
    SimCLR: {"hidden_dim": 12, "projection_dim": 6},
    MoCoV2: {"hidden_dim": 12, "projection_dim": 6, "queue_size": 32},
    BYOL: {"hidden_dim": 12, "projection_dim": 6},
    C2BIN: {"hidden_dim": 12, "projection_dim": 6, "num_clusters": (3, 5)},
}


class Backbone(nn.Sequential):
    """Images (n, 3, 4, 4) to features (n, 8), with a batch norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


class Pairs(Dataset[tuple[tuple[Tensor, Tensor], int]]):
    """Sixteen fixed pairs of views."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(7)
        self.views = torch.randn(2, 16, 3, 4, 4, generator=draw)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> tuple[tuple[Tensor, Tensor], int]:
        return (self.views[0, i], self.views[1, i]), i % 4


def build(kind: type[LightningModule], **options: Any) -> LightningModule:
    torch.manual_seed(0)
    return kind(Backbone(), 8, **{**OPTIONS[kind], **options})


def trainer(epochs: int = 1, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    return Trainer(max_epochs=epochs, **{**quiet, **options})


def loader(batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(Pairs(), batch_size=batch_size)


@pytest.mark.parametrize("kind", METHODS)
class TestEveryMethod:
    def test_a_step_reaches_the_runner_and_not_the_follower(self, kind: Any) -> None:
        model = build(kind)
        view0, view1 = torch.randn(2, 8, 3, 4, 4)
        model.losses(view0, view1)["loss"].backward()
        for name, parameter in model.named_parameters():
            if "follower" in name:
                assert parameter.grad is None
                assert not parameter.requires_grad
            else:
                assert parameter.grad is not None, name
        assert float(model.backbone[0].weight.grad.norm()) > 1e-5

    def test_training_lowers_the_loss(self, kind: Any) -> None:
        # The queue of MoCo v2 starts with random negatives, which are easier than real ones.
        options = {"symmetric": False, "queue_size": 8} if kind is MoCoV2 else {}
        model = build(kind, lr=0.1, schedule="constant", **options)
        losses: list[float] = []
        step = model.training_step

        def spy(batch: Any, batch_idx: int) -> Tensor:
            loss = step(batch, batch_idx)
            assert isinstance(loss, Tensor)
            losses.append(float(loss.detach()))
            return loss

        model.training_step = spy
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(epochs=40).fit(model, loader(16))
        assert len(losses) == 40
        assert min(losses[-3:]) < losses[3] - 0.02

    def test_no_weight_decay_on_norms_and_biases(self, kind: Any) -> None:
        model = build(kind, weight_decay=0.25)
        trainer().fit(model, loader())
        optimizer = model.optimizers().optimizer
        groups = optimizer.param_groups
        decayed = {id(p) for g in groups if g["weight_decay"] == 0.25 for p in g["params"]}
        undecayed = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                norm = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
                if not parameter.requires_grad:
                    assert id(parameter) not in decayed | undecayed
                elif norm or name == "bias":
                    assert id(parameter) in undecayed
                else:
                    assert id(parameter) in decayed

    def test_lightlys_batch_with_names_is_the_same_batch(self, kind: Any) -> None:
        batch = next(iter(loader()))
        named = ([*batch[0]], batch[1], ["a.jpg"] * 8)
        losses = []
        for given in (batch, named):
            model = build(kind)
            model.log_dict = lambda *_, **__: None
            losses.append(float(model.training_step(given, 0).detach()))
        assert losses[0] == losses[1]

    def test_checkpoint_gives_back_every_tensor(self, kind: Any, tmp_path: Path) -> None:
        model = build(kind, lr=0.3)
        fitted = trainer(epochs=2)
        fitted.fit(model, loader())
        fitted.save_checkpoint(tmp_path / "a.ckpt")
        loaded = kind.load_from_checkpoint(
            tmp_path / "a.ckpt", backbone=Backbone(), weights_only=True
        )
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.optimization["lr"] == 0.3

    def test_resumed_equals_uninterrupted(self, kind: Any, tmp_path: Path) -> None:
        whole = build(kind)
        trainer(epochs=4).fit(whole, loader())
        # The same schedule, stopped after two of its four epochs.
        stopped = build(kind)
        half = trainer(epochs=4, limit_train_batches=2, callbacks=[StopAfter(2)])
        half.fit(stopped, loader())
        half.save_checkpoint(tmp_path / "half.ckpt")
        resumed = build(kind)
        trainer(epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name

    def test_mistakes_are_named(self, kind: Any, complains: Any) -> None:
        with complains(TypeError, "learning_rate", "lr"):
            build(kind, learning_rate=0.1)
        with complains(ValueError, "optimizer", "'lion'", "lars"):
            build(kind, optimizer="lion")
        with complains(ValueError, "schedule", "'step'", "cosine"):
            build(kind, schedule="step")


class StopAfter(Callback):
    """Stops a fit after so many epochs without changing what the schedule was built for."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


class TestFollower:
    @pytest.mark.parametrize("kind", [MoCoV2, BYOL, C2BIN])
    def test_moves_by_equation_8(self, kind: Any) -> None:
        model = build(kind, follower_momentum=0.75, lr=0.5, schedule="constant")
        pairs = [
            ("backbone", "follower_backbone"),
            ("projector", "follower_projector"),
        ]
        before = [
            [p.detach().clone() for p in getattr(model, follower).parameters()]
            for _, follower in pairs
        ]
        trainer(limit_train_batches=1).fit(model, loader())
        moved = 0.0
        for (runner, follower), old in zip(pairs, before, strict=True):
            now = getattr(model, follower).parameters()
            for theta, phi, was in zip(getattr(model, runner).parameters(), now, old, strict=True):
                torch.testing.assert_close(phi, 0.75 * was + 0.25 * theta, rtol=0, atol=1e-7)
                moved = max(moved, float((phi - was).detach().abs().max()))
        assert moved > 1e-4

    def test_starts_as_a_copy_of_its_own(self) -> None:
        model = build(BYOL)
        assert torch.equal(model.backbone[0].weight, model.follower_backbone[0].weight)
        assert model.backbone[0].weight.data_ptr() != model.follower_backbone[0].weight.data_ptr()

    def test_moves_once_for_each_optimizer_step(self) -> None:
        # Weight decay and rate 0: the runner stands still, so only the number of moves shows.
        model = build(BYOL, follower_momentum=0.5, lr=0.0)
        with torch.no_grad():
            model.follower_backbone[0].weight.zero_()
        trainer(accumulate_grad_batches=2).fit(model, loader(batch_size=4))
        share = model.follower_backbone[0].weight / model.backbone[0].weight
        torch.testing.assert_close(share, torch.full_like(share, 0.75))  # two steps: 1 − ½²

    def test_cosine_schedule_ends_standing_still(self) -> None:
        model = build(BYOL, follower_momentum=0.5, follower_schedule="cosine", lr=0.0)
        with torch.no_grad():
            model.follower_backbone[0].weight.zero_()
        trainer().fit(model, loader())  # two steps: γ = 0.5, then 1
        share = model.follower_backbone[0].weight / model.backbone[0].weight
        torch.testing.assert_close(share, torch.full_like(share, 0.5))

    def test_batch_norm_uses_the_batch_and_has_statistics_of_its_own(self) -> None:
        model = build(BYOL, lr=0.0)
        before = model.follower_backbone[1].running_mean.clone()
        trainer().fit(model, loader())
        assert model.follower_backbone[1].training
        assert not torch.equal(model.follower_backbone[1].running_mean, before)

    @pytest.mark.parametrize(
        ("option", "value"), [("follower_momentum", 1.5), ("follower_schedule", "linear")]
    )
    def test_mistakes_are_named(self, option: str, value: Any, complains: Any) -> None:
        with complains(ValueError, option, str(value)):
            build(BYOL, **{option: value})


class TestC2BIN:
    def test_against_the_follower(self, complains: Any) -> None:
        model = build(C2BIN)
        with torch.no_grad():  # so that the follower is another network
            for parameter in model.follower_backbone.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        view0, view1 = torch.randn(2, 8, 3, 4, 4)
        found = model.losses(view0, view1)
        own = [model.cluster_head(model(view)) for view in (view0, view1)]
        other = [model.cluster_head(model.follower_backbone(view)) for view in (view0, view1)]
        contrasts = [
            bca_contrastive_loss(a, b, temperature=model.criterion.loss.temperature)
            for pair in ((own[0], other[1]), (own[1], other[0]))
            for a, b in zip(*pair, strict=True)
        ]
        torch.testing.assert_close(found["contrast"], sum(contrasts) / 2)
        runner = build(C2BIN, against="runner")
        runner.load_state_dict(model.state_dict())
        same = runner.losses(view0, view1)
        torch.testing.assert_close(same["alignment"], found["alignment"])
        assert not torch.allclose(same["contrast"], found["contrast"])
        found["loss"].backward()
        assert all(p.grad is None for p in model.follower_backbone.parameters())
        assert all(p.grad is not None for p in model.cluster_head.parameters())
        with complains(ValueError, "against", "'runner' or 'follower'", "'both'"):
            build(C2BIN, against="both")

        class Doubled(torch.nn.Module):
            def forward(self, *args: Any, **options: Any) -> Any:
                output = C2BINLoss()(*args, **options)
                return output._replace(loss=2 * output.loss)

        doubled = build(C2BIN, loss=Doubled())  # any module with the call of C2BINLoss
        doubled.load_state_dict(model.state_dict())
        torch.testing.assert_close(doubled.losses(view0, view1)["loss"], 2 * found["loss"])

    def test_a_loss_that_was_given_stays_as_it_is(self) -> None:
        """What the adapter builds spans ranks, and nothing else is told to."""
        given = C2BINLoss()
        model = build(C2BIN, loss=given)
        two_ranks: Any = SimpleNamespace(world_size=2)
        model._trainer = two_ranks
        with pytest.warns(UserWarning, match="gather_distributed is False, so each of the 2 proc"):
            model.setup("fit")
        assert given.options()["gather_distributed"] is False
        for loss in (None, C2BINLoss(gather_distributed=True)):
            model = build(C2BIN, loss=loss)
            model._trainer = two_ranks
            model.setup("fit")  # warnings are errors here
            assert model.criterion.loss.gather_distributed
        simclr = build(SimCLR)
        simclr.backbone.gather_distributed = False
        simclr._trainer = two_ranks
        simclr.setup("fit")
        assert simclr.criterion.gather_distributed
        assert not simclr.backbone.gather_distributed

    def test_half_precision_with_scaled_gradients(self) -> None:
        """The arithmetic of precision 16-mixed, which Lightning keeps for GPUs."""
        model = build(C2BIN, num_clusters=(4, 6))
        model.log_dict = lambda *args, **kwargs: None
        views = torch.rand(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        exact = copy.deepcopy(model).losses(*views)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model.training_step(((views[0], views[1]), None), 0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        assert loss.dtype is torch.float32
        torch.testing.assert_close(losses[0], exact["loss"].detach(), rtol=1e-2, atol=0)
        assert losses[-1] < losses[0]
        assert scaler.get_scale() == 2.0**14  # no step was left out for an overflow

    def test_is_byol_plus_heads_on_backbone_features(self) -> None:
        byol, c2bin = build(BYOL), build(C2BIN, loss=C2BINLoss(cluster_weight=0.0))
        extra = set(c2bin.state_dict()) - set(byol.state_dict())
        assert extra == {"criterion.head.linear.weight", "criterion.head.linear.bias"}
        c2bin.load_state_dict(byol.state_dict(), strict=False)
        view0, view1 = torch.randn(2, 8, 3, 4, 4)
        ours, theirs = c2bin.losses(view0, view1), byol.losses(view0, view1)
        torch.testing.assert_close(ours["loss"], theirs["loss"])
        features = c2bin(view0)
        features = features / features.norm(dim=1, keepdim=True) * features.shape[1] ** 0.5
        expected = (features @ c2bin.cluster_head.linear.weight[:3].T).add(
            c2bin.cluster_head.linear.bias[:3]
        )
        torch.testing.assert_close(c2bin.assignments(view0)[0], expected.softmax(dim=1))

    def test_normalize_reaches_the_heads_and_the_checkpoint(self) -> None:
        view = torch.rand(8, 3, 4, 4)
        model, plain = build(C2BIN), build(C2BIN, normalize=False)
        assert (model.hparams["normalize"], plain.hparams["normalize"]) == (True, False)
        plain.load_state_dict(model.state_dict())
        features = model(view)
        scaled = features / features.norm(dim=1, keepdim=True) * features.shape[1] ** 0.5
        for found, expected in zip(
            model.assignments(view), plain.cluster_head(scaled), strict=True
        ):
            torch.testing.assert_close(found, expected)
        for found, expected in zip(
            plain.assignments(view), plain.cluster_head(features), strict=True
        ):
            torch.testing.assert_close(found, expected)

    def test_logs_the_parts_and_the_effective_clusters(self) -> None:
        model = build(C2BIN)
        fitted = trainer()
        fitted.fit(model, loader())
        logged = {name: float(value) for name, value in fitted.callback_metrics.items()}
        assert set(logged) == {
            "train_loss",
            "train_alignment",
            "train_contrast",
            "train_entropy",
            "train_effective_clusters_0_of_3",
            "train_effective_clusters_1_of_5",
        }
        terms = logged["train_contrast"] + logged["train_entropy"]
        total = logged["train_alignment"] + model.criterion.loss.cluster_weight * terms
        assert logged["train_loss"] == pytest.approx(total, rel=1e-5)
        assert 1 <= logged["train_effective_clusters_1_of_5"] <= 5

    def test_effective_clusters_are_exp_of_the_entropy(self) -> None:
        model = build(C2BIN)
        view0, view1 = torch.randn(2, 8, 3, 4, 4)
        mean = model.assignments(view0)[1].detach().double().mean(dim=0)
        expected = float((-(mean * mean.log()).sum()).exp())
        found = float(model.losses(view0, view1)["effective_clusters_1_of_5"])
        assert found == pytest.approx(expected, rel=1e-5)
        assert expected < 4.999

    def test_warns_when_clusters_outnumber_the_batch(self) -> None:
        with pytest.warns(UserWarning, match="9 clusters but a global batch has 8 images"):
            trainer().fit(build(C2BIN, num_clusters=(4, 9)), loader())

    def test_is_silent_when_they_do_not(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer().fit(build(C2BIN, num_clusters=(4, 8)), loader())
        assert not [w for w in caught if "clusters" in str(w.message)]


class TestOptimizers:
    @pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("lars", "LARS"), ("adam", "Adam")])
    def test_the_named_one_is_used(self, name: str, kind: str) -> None:
        model = build(BYOL, optimizer=name)
        trainer().fit(model, loader())
        assert type(model.optimizers().optimizer).__name__ == kind

    @pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0004), ("constant", 0.4)])
    def test_schedule_and_warmup(self, schedule: Any, last: float) -> None:
        rates: list[float] = []

        class Rates(Callback):
            def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        model = build(SimCLR, lr=0.4, schedule=schedule, warmup_epochs=2)
        trainer(epochs=4, callbacks=[Rates()]).fit(model, loader())
        assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
        assert rates[4] == pytest.approx(0.4)
        assert rates[-1] == pytest.approx(last)


class Endless(IterableDataset[Any]):
    """Pairs of views without a length: `n` of them, image i full of i."""

    def __init__(self, n: int = 24) -> None:
        self.n = n

    def __iter__(self) -> Any:
        for i in range(self.n):
            yield (torch.full((3, 4, 4), float(i)) + torch.randn(3, 4, 4) / 9,) * 2, i % 4


class Rates(Callback):
    """Learning rates and numbers of the first images, step by step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, _: Any, batch: Any, __: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.seen.append(round(float(batch[0][0][0].mean())))


@pytest.mark.filterwarnings("ignore:.*IterableDataset.*")
class TestSchedules:
    """What needs the length of a run says so by name; what can run, runs."""

    def rates(self, batches: Any, model: dict[str, Any], **options: Any) -> list[float]:
        watch = Rates()
        fit = trainer(options.pop("max_epochs", None), callbacks=[watch], **options)
        fit.fit(build(BYOL, lr=0.4, **model), batches)
        return watch.rates

    def test_max_steps_with_a_warm_up_in_epochs(self) -> None:
        # Two steps an epoch; 3 of them are the warm-up of 1.5 epochs.
        for options in ({"max_epochs": -1}, {}, {"max_epochs": 1000}):
            rates = self.rates(loader(), {"warmup_epochs": 1.5}, max_steps=6, **options)
            assert rates[:4] == pytest.approx([0.4 / 3, 0.8 / 3, 0.4, 0.4])
            assert len(rates) == 6
            assert rates[-1] == pytest.approx(0.0004)

    def test_a_warm_up_longer_than_the_run(self) -> None:
        rates = self.rates(loader(), {"warmup_epochs": 4}, max_steps=2)
        assert rates == pytest.approx([0.2, 0.4])

    @pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_time": {"hours": 1}}])
    @pytest.mark.parametrize("name", ["schedule", "follower_schedule"])
    def test_a_cosine_over_an_endless_run_is_named(
        self, options: dict[str, Any], name: str, complains: Any
    ) -> None:
        kinds = {"schedule": "constant", "follower_schedule": "constant", name: "cosine"}
        with complains(ValueError, f"{name}='cosine'", "max_epochs=-1", "max_steps"):
            self.rates(loader(), kinds, **options)

    def test_constant_schedules_need_no_end(self) -> None:
        class Stop(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                trainer.should_stop = trainer.global_step >= 5

        watch = Rates()
        fit = trainer(-1, callbacks=[Stop(), watch], min_steps=5)
        fit.fit(build(BYOL, lr=0.4, schedule="constant", warmup_epochs=1), loader())
        assert watch.rates == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.4])

    def test_a_loader_without_length(self, complains: Any) -> None:
        batches = DataLoader(Endless(), batch_size=8)
        with complains(ValueError, "schedule='cosine'", "inf batches an epoch", "max_steps"):
            self.rates(batches, {}, max_epochs=2)
        with complains(ValueError, "warmup_epochs=1", "a training loader with a length"):
            self.rates(batches, {"warmup_epochs": 1}, max_steps=4)
        rates = self.rates(batches, {}, max_steps=4)
        assert (len(rates), rates[0]) == (4, 0.4)
        assert rates[-1] == pytest.approx(0.0004)
        assert self.rates(batches, {"schedule": "constant"}, max_epochs=2) == [0.4] * 6

    def test_a_limit_stands_in_for_a_length(self) -> None:
        batches = DataLoader(Endless(), batch_size=8)
        options = {"max_epochs": 2, "limit_train_batches": 2}
        rates = self.rates(batches, {"warmup_epochs": 1}, **options)
        assert rates == pytest.approx([0.2, 0.4, 0.4, 0.0004])

    def test_limits_and_accumulation_count_as_in_lightning(self) -> None:
        # 2 epochs of 3 of the 4 batches, two a step: 4 steps, one epoch of warm-up.
        options = {"max_epochs": 2, "limit_train_batches": 3, "accumulate_grad_batches": 2}
        rates = self.rates(loader(4), {"warmup_epochs": 1}, **options)
        assert rates == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.4, 0.0004])


@pytest.mark.filterwarnings("ignore:.*IterableDataset.*")
class TestLoadersWithoutLength:
    @pytest.fixture(autouse=True)
    def _seeded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PL_GLOBAL_SEED", "3")  # what seed_everything leaves behind

    def run(self, epochs: int, watch: Rates, **options: Any) -> tuple[Trainer, LightningModule]:
        model = build(BYOL, schedule="constant")
        fit = trainer(4, callbacks=[watch, StopAfter(epochs)])
        fit.fit(model, DataLoader(Endless(), batch_size=8), **options)
        return fit, model

    def test_each_batch_is_trained_once_an_epoch(self) -> None:
        watch = Rates()
        self.run(2, watch)
        assert watch.seen == [0, 8, 16] * 2

    def test_resumed_equals_uninterrupted(self, tmp_path: Path) -> None:
        _, whole = self.run(4, Rates())
        half, _ = self.run(2, Rates())
        half.save_checkpoint(tmp_path / "half.ckpt")
        watch = Rates()
        _, resumed = self.run(4, watch, ckpt_path=tmp_path / "half.ckpt")
        assert watch.seen == [0, 8, 16] * 2
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name

    def test_an_iterator_loses_no_batch(self) -> None:
        watch = Rates()
        batches = iter([*DataLoader(Endless(), batch_size=8)])
        trainer(callbacks=[watch]).fit(build(BYOL, schedule="constant"), batches)
        assert watch.seen == [0, 8, 16]


class TestBatches:
    views = torch.randn(3, 8, 3, 4, 4)

    @pytest.mark.parametrize(
        ("batch", "came"),
        [
            ([views[0], views[1]], "[a tensor of shape (8, 3, 4, 4), a tensor of shape"),
            ([[*views], torch.arange(8)], "[[a tensor"),
            ([[views[0]], torch.arange(8)], "[[a tensor of shape (8, 3, 4, 4)], a tensor"),
            ((views[0][:2], torch.arange(2)), "[a tensor of shape (2, 3, 4, 4)"),
            (views[0], "a tensor of shape (8, 3, 4, 4)"),
            ({"views": views}, "dict"),
        ],
    )
    def test_what_is_no_pair_of_views_is_named(self, batch: Any, came: str, complains: Any) -> None:
        for kind in METHODS:
            with complains(ValueError, "training batch", "((view0, view1)", came):
                build(kind).training_step(batch, 0)

    @pytest.mark.parametrize(
        ("batch", "kind", "came"),
        [
            (torch.randn(8, 3, 4, 4), ValueError, "a tensor of shape (8, 3, 4, 4)"),
            ([[*views[:2]], torch.arange(8)], ValueError, "[[a tensor of shape"),
            ([views[0], ["cat"] * 8], TypeError, "[str, str"),
            ([views[0], torch.arange(8) > 3], ValueError, "torch.bool"),
        ],
    )
    def test_validation_batches_are_named_at_the_first(
        self, batch: Any, kind: type[Exception], came: str, complains: Any
    ) -> None:
        once: DataLoader[Any] = DataLoader([batch], batch_size=None)
        with complains(kind, came, ("validation batch", "labels")):
            trainer().validate(build(C2BIN), once, verbose=False)


class TestComposition:
    def test_a_method_is_a_module_that_knows_no_trainer(self) -> None:
        for kind in METHODS:
            model = build(kind)
            assert not any(isinstance(m, LightningModule) for m in model.method.modules())
            loss = model.method.step(*torch.randn(2, 8, 3, 4, 4))["loss"]
            assert loss.isfinite()
            assert loss.requires_grad

    def test_parts_are_read_and_set_through_the_module(self) -> None:
        model = build(MoCoV2)
        assert model.projector is model.method.projector
        model.projector = nn.Linear(8, 6)
        assert model.method.projector is model.projector
        assert {n for n in model.state_dict() if n.startswith("projector")} == {
            "projector.weight",
            "projector.bias",
        }
        with pytest.raises(AttributeError, match="no_such_part"):
            _ = model.no_such_part

    def test_names_of_weights_are_those_that_evaluations_look_for(self) -> None:
        holder = nn.ModuleDict({"model": build(C2BIN)})
        names = {name.split(".")[1] for name in holder.state_dict()}
        parts = {"backbone", "projector", "predictor", "criterion"}
        assert names == parts | {"follower_backbone", "follower_projector"}
        other = nn.ModuleDict({"model": build(C2BIN)})
        with torch.no_grad():
            for parameter in holder.parameters():
                parameter.add_(1)
        other.load_state_dict(holder.state_dict())
        for name, tensor in holder.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name

    def test_heads_run_once_for_each_view_of_each_network(self) -> None:
        model = build(C2BIN)
        calls: list[int] = []
        model.cluster_head.register_forward_hook(lambda *_: calls.append(1))
        model.losses(*torch.randn(2, 8, 3, 4, 4))
        assert len(calls) == 4


RANKS = """
import os, sys, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from pytorch_lightning import LightningModule, Trainer
import c2bin_lightly, logging, warnings
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

devices, out = int(sys.argv[1]), sys.argv[2]

class Pairs(Dataset):
    views = torch.randn(2, 24, 3, 4, 4, generator=torch.Generator().manual_seed(7)).double()
    def __len__(self):
        return 24
    def __getitem__(self, i):
        return (self.views[0, i], self.views[1, i]), 0

class Shard:
    # A global batch of 8 is the same images for one process and for two.
    def __init__(self, rank):
        self.rank = rank
    def __len__(self):
        return 24 // devices
    def __iter__(self):
        n = 8 // devices
        for start in range(0, 24, 8):
            yield from range(start + self.rank * n, start + (self.rank + 1) * n)


def train(kind):
    torch.manual_seed(0)
    # No batch norm: its statistics are of one rank's images, as in every method under plain DDP.
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh())
    options = {"hidden_dim": 12, "projection_dim": 6, "lr": 0.3}
    options |= {"C2BIN": {"num_clusters": (3, 5)}, "MoCoV2": {"queue_size": 16}}.get(kind, {})
    model = getattr(c2bin_lightly, kind)(backbone, 8, **options)
    for name in ("projector", "follower_projector", "predictor"):
        if hasattr(model, name):
            head = getattr(model, name)
            kept = [module for module in head.layers if not isinstance(module, nn.BatchNorm1d)]
            head.layers = nn.Sequential(*kept)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=devices, precision="64-true",
        strategy="ddp" if devices > 1 else "auto", use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    trainer.fit(model, DataLoader(Pairs(), batch_size=8 // devices, sampler=Shard(rank)))
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if "effective" not in k}
    return {"state": model.state_dict(), "logged": logged}

torch.set_num_threads(1)
trained = {kind: train(kind) for kind in ("SimCLR", "MoCoV2", "BYOL", "C2BIN")}
if os.environ.get("LOCAL_RANK", "0") == "0":
    torch.save(trained, out)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What one process and two made of the same global batches, by number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "ranks.py"
    script.write_text(RANKS)
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK")}
    environment["OMP_NUM_THREADS"] = "1"
    running = []
    for devices in (1, 2):
        command = [sys.executable, script, str(devices), folder / f"{devices}.pt"]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    for process in running:
        errors = process.communicate(timeout=240)[1].decode()
        assert process.returncode == 0, errors
    return {n: torch.load(folder / f"{n}.pt", weights_only=True) for n in (1, 2)}


@pytest.mark.parametrize("kind", METHODS)
def test_two_processes_train_as_one_with_the_whole_batch(kind: Any, trained: Any) -> None:
    one, two = (trained[n][kind.__name__] for n in (1, 2))
    assert two["logged"] == pytest.approx(one["logged"], rel=1e-9)
    for name, tensor in one["state"].items():
        torch.testing.assert_close(two["state"][name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_without_lightly_the_import_says_what_to_install() -> None:
    code = """
        import sys
        sys.modules["lightly"] = None
        try:
            import c2bin_lightly
        except ImportError as error:
            print(error)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    shown = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert 'pip install "c2bin-ext[lightly]"' in shown
