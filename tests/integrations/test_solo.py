"""c2bin_solo: configs against the tables, the objective, ranks, restarts, solo-learn's scripts.

The tests that run solo-learn's scripts need a checkout of it, named by the environment variable
SOLO_LEARN: `SOLO_LEARN=~/solo-learn python -m pytest tests/integrations/test_solo.py`.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import solo_tables
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

if importlib.util.find_spec("solo") is None:
    pytest.skip(
        'needs solo-learn: pip install "c2bin-ext[solo]", then pip install --no-deps '
        '--no-build-isolation "solo-learn @ git+https://github.com/vturrisi/solo-learn"',
        allow_module_level=True,
    )

# solo-learn and timm warn while they are imported.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import c2bin_solo
    from c2bin_solo import C2BIN, load_backbone, register
    from solo.methods import METHODS
    from solo.methods.base import BaseMethod

from hydra import compose, initialize_config_module
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from c2bin_ext import C2BINObjective
from c2bin_ext.functional import c2bin_loss

INTEGRATIONS = Path(c2bin_solo.__file__).parents[1]
CHECKOUT = os.environ.get("SOLO_LEARN", "")
needs_checkout = pytest.mark.skipif(
    not (CHECKOUT and (Path(CHECKOUT) / "main_pretrain.py").is_file()),
    reason="needs SOLO_LEARN=<a checkout of https://github.com/vturrisi/solo-learn>",
)
# Lightning and solo-learn call what torch, Python and the operating system are about to drop.
pytestmark = [pytest.mark.filterwarnings("ignore")]

KWARGS = {
    "proj_hidden_dim": 12,
    "proj_output_dim": 6,
    "pred_hidden_dim": 10,
    "num_clusters": [3, 5],
}


def config(**overrides: Any) -> DictConfig:
    """What solo-learn's main_pretrain hands to a method, small."""
    cfg = OmegaConf.create(
        {
            "method": "c2bin",
            "seed": 3,
            "backbone": {"name": "resnet18", "kwargs": {}},
            "method_kwargs": KWARGS,
            "momentum": {"base_tau": 0.9, "final_tau": 1.0},
            "data": {
                "dataset": "cifar10",
                "num_classes": 4,
                "num_large_crops": 2,
                "num_small_crops": 0,
            },
            "optimizer": {
                "name": "sgd",
                "batch_size": 4,
                "lr": 0.1,
                "weight_decay": 0.0,
                "classifier_lr": 0.1,
            },
            "scheduler": {"name": "none"},
            "max_epochs": 2,
            "performance": {"disable_channel_last": True},
        }
    )
    for path, value in overrides.items():
        OmegaConf.update(cfg, path.replace("__", "."), value, force_add=True)
    return cfg


def build(**overrides: Any) -> C2BIN:
    torch.manual_seed(0)
    model = C2BIN(config(**overrides))
    model.log_dict = lambda *args, **kwargs: None
    return model


def crops(*sizes: int, n: int = 4, seed: int = 1) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, size, size, generator=draw) for size in sizes]


class TestConfigs:
    @pytest.fixture(autouse=True)
    def _hydra(self) -> Iterator[None]:
        with initialize_config_module("c2bin_solo.configs", version_base="1.2"):
            yield

    @pytest.mark.parametrize("name", [*solo_tables.PRETRAINING, *solo_tables.LINEAR])
    def test_carries_the_numbers_of_the_paper(self, name: str) -> None:
        cfg = compose(name)
        table = {**solo_tables.PRETRAINING, **solo_tables.LINEAR}[name]
        found = {path: OmegaConf.select(cfg, path) for path in table}
        assert {p: list(v) if OmegaConf.is_list(v) else v for p, v in found.items()} == table

    @pytest.mark.parametrize("name", solo_tables.LINEAR)
    def test_linear_rates(self, name: str) -> None:
        rates = (30.0,) if name.endswith("imagenet") else solo_tables.TABLE_6_RATES
        assert compose(name).optimizer.lr in rates

    def test_every_config_is_held_against_a_table(self) -> None:
        folder = INTEGRATIONS / "c2bin_solo" / "configs"
        names = {path.stem for path in folder.glob("*.yaml")}
        assert names == set(solo_tables.PRETRAINING) | set(solo_tables.LINEAR)

    @pytest.mark.parametrize("name", [*solo_tables.PRETRAINING, *solo_tables.LINEAR])
    def test_solo_learn_accepts_it(self, name: str, tmp_path: Path) -> None:
        from solo.args import linear, pretrain

        overrides = ["data.train_path=" + str(tmp_path), "data.val_path=" + str(tmp_path)]
        is_linear = name in solo_tables.LINEAR
        if is_linear:
            overrides.append("pretrained_feature_extractor=model.ckpt")
        register()
        cfg = compose(name, overrides)
        OmegaConf.set_struct(cfg, False)
        cfg = (linear if is_linear else pretrain).parse_cfg(cfg)
        if not is_linear:
            cfg = C2BIN.add_and_assert_specific_cfg(cfg)
            assert cfg.data.num_large_crops == 2
            assert cfg.backbone.name in BaseMethod._BACKBONES
        # One device and 256 images: solo-learn's scaling leaves the rates of the tables.
        assert cfg.optimizer.lr == compose(name, overrides).optimizer.lr

    @needs_checkout
    def test_no_name_of_a_file_is_one_of_solo_learn_s(self) -> None:
        folder = INTEGRATIONS / "c2bin_solo" / "configs"
        ours = {path.relative_to(folder) for path in folder.rglob("*.yaml")}
        for root in (Path(CHECKOUT) / "scripts").glob("*/*"):
            assert not ours & {path.relative_to(root) for path in root.rglob("*.yaml")}


class TestOptions:
    def test_every_option_of_the_loss_and_the_head_has_a_default_in_args_json(self) -> None:
        cfg = config()
        cfg.method_kwargs = {}
        kwargs = C2BIN.add_and_assert_specific_cfg(cfg).method_kwargs
        best = {"cluster_weight": 0.5, "temperature": 0.1, "normalize": True}
        assert {name: kwargs[name] for name in best} == best
        for name, parameter in inspect.signature(C2BINObjective).parameters.items():
            if name not in ("in_features", "gather_distributed", "num_clusters"):
                assert kwargs[name] == parameter.default, name
        assert kwargs.against == "follower"
        # On by itself where there are several processes.
        assert kwargs.gather_distributed is True
        assert list(kwargs.num_clusters) == [32, 64, 128]
        json.dumps(OmegaConf.to_container(cfg))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("temperature", 0.0),
            ("cluster_weight", -1.0),
            ("entropy_weight", float("nan")),
            ("similarity", "euclidean"),
            ("reduction", "none"),
            ("num_clusters", [1]),
            ("num_clusters", []),
            ("proj_hidden_dim", 0),
            ("proj_output_dim", 2.5),
            ("pred_hidden_dim", None),
            ("tempreature", 0.5),
            ("against", "both"),
        ],
    )
    def test_impossible_values_are_named(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=name):
            C2BIN(config(method_kwargs={**KWARGS, name: value}))

    def test_options_reach_the_modules(self) -> None:
        options = {"temperature": 0.7, "similarity": "dot", "reduction": "sum", "bias": False}
        options["normalize"] = False
        model = build(method_kwargs={**KWARGS, **options})
        assert model.objective.loss.temperature == 0.7
        assert model.objective.loss.similarity == "dot"
        assert model.objective.loss.reduction == "sum"
        assert model.cluster_head.linear.bias is None
        assert not model.cluster_head.normalize
        assert model.cluster_head.num_clusters == (3, 5)

    def test_register_is_repeatable_and_replaces_nothing(self, monkeypatch: Any) -> None:
        register()
        register()
        assert METHODS["c2bin"] is C2BIN
        monkeypatch.setitem(METHODS, "c2bin", METHODS["byol"])
        with pytest.raises(ValueError, match=r"BYOL"):
            register()


class TestObjective:
    def terms(self, model: C2BIN, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Any]:
        """Predictions of all crops, targets and assignments of the large ones, from the parts."""
        features = [model.backbone(x) for x in views]
        predictions = [model.predictor(model.projector(f)) for f in features]
        with torch.no_grad():
            targets = [model.momentum_projector(model.momentum_backbone(x)) for x in views[:2]]
        return predictions, targets, [model.cluster_head(f) for f in features[:2]]

    def test_is_the_loss_of_the_parts_plus_the_classifier_s(self) -> None:
        papers = {"against": "runner", "temperature": 0.5, "cluster_weight": 2.0}
        model, views = build(method_kwargs={**KWARGS, **papers}), crops(16, 16)
        labels = torch.tensor([0, 1, 2, 3])
        loss = copy.deepcopy(model).training_step([None, views, labels], 0)
        predictions, targets, assignments = self.terms(copy.deepcopy(model), views)
        objective = c2bin_loss(
            predictions,
            targets,
            assignments,
            cluster_weight=2.0,
            entropy_weight=1.0,
            temperature=0.5,
        ).loss
        other = copy.deepcopy(model)
        logits = [other.classifier(other.backbone(x)) for x in views]
        classes = sum(torch.nn.functional.cross_entropy(x, labels) for x in logits) / 2
        torch.testing.assert_close(loss, objective + classes)

    def test_against_the_follower(self) -> None:
        model, views = build(), crops(16, 16)
        with torch.no_grad():  # so that the follower is another network
            for parameter in model.momentum_backbone.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        unlabelled = torch.full((4,), -1)
        loss = copy.deepcopy(model).training_step([None, views, unlabelled], 0)
        predictions, targets, assignments = self.terms(copy.deepcopy(model), views)
        other = copy.deepcopy(model)
        fixed = [other.cluster_head(other.momentum_backbone(x)) for x in views]
        own, *ways = (
            c2bin_loss(predictions, targets, pair, temperature=0.1)
            for pair in (assignments, (assignments[0], fixed[1]), (assignments[1], fixed[0]))
        )
        contrast = (ways[0].contrast + ways[1].contrast) / 2
        torch.testing.assert_close(loss, own.alignment + 0.5 * (contrast + own.entropy))

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_multicrop_aligns_every_pair_with_a_large_crop(self, symmetric: bool) -> None:
        kwargs = {**KWARGS, "cluster_weight": 0.0, "symmetric_alignment": symmetric}
        model = build(method_kwargs=kwargs, data__num_small_crops=3)
        views, unlabelled = crops(16, 16, 8, 8, 8), torch.full((4,), -1)
        loss = copy.deepcopy(model).training_step([None, views, unlabelled], 0)
        predictions, targets, _ = self.terms(copy.deepcopy(model), views)
        pairs = [
            1 - cosine_similarity(predictions[v], targets[t], dim=1).mean()
            for t in ((0, 1) if symmetric else (1,))
            for v in range(5)
            if v != t
        ]
        torch.testing.assert_close(loss, torch.stack(pairs).mean())

    def test_two_crops_align_as_in_solo_learn_s_byol(self) -> None:
        views, unlabelled = crops(16, 16), torch.full((4,), -1)
        ours = build(method_kwargs={**KWARGS, "cluster_weight": 0.0})
        loss = copy.deepcopy(ours).training_step([None, views, unlabelled], 0)
        parts = ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim")
        cfg = config(method="byol", method_kwargs={name: KWARGS[name] for name in parts})
        byol = METHODS["byol"](cfg)
        byol.load_state_dict(ours.state_dict(), strict=False)
        logged: dict[str, Tensor] = {}
        byol.log_dict = lambda values, **kwargs: logged.update(values)
        byol.training_step([None, views, torch.zeros(4, dtype=torch.long)], 0)
        # BYOL's loss is 2 - 2cos, summed over both directions.
        torch.testing.assert_close(loss * 4, logged["train_neg_cos_sim"])

    def test_unlabelled_images_leave_the_loss_finite(self) -> None:
        model = build(data__num_classes=1)
        loss = model.training_step([None, crops(16, 16), torch.full((4,), -1)], 0)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        # In the graph, so that DDP need not look for unused parameters.
        assert model.classifier.weight.grad is not None

    def test_gradients_reach_the_runner_and_not_the_follower(self) -> None:
        model = build()
        model.training_step([None, crops(16, 16), torch.tensor([0, 1, 2, 3])], 0).backward()
        for name, parameter in model.named_parameters():
            follower = name.startswith("momentum")
            assert (parameter.grad is None) == follower, name
            assert parameter.requires_grad != follower, name

    def test_every_trained_parameter_is_in_one_group(self) -> None:
        model = build()
        listed = [id(p) for group in model.learnable_params for p in group["params"]]
        trained = [id(p) for p in model.parameters() if p.requires_grad]
        assert sorted(listed) == sorted(trained)

    def test_starts_from_torchvision_s_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.models import ResNet18_Weights, resnet18

        published = resnet18().state_dict()
        monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: published)
        model = build(data__dataset="custom", backbone__kwargs__weights="IMAGENET1K_V1")
        for network in (model.backbone, model.momentum_backbone):
            for name, value in network.state_dict().items():
                assert torch.equal(value, published[name]), name

    @pytest.mark.parametrize("backbone", ["vit_tiny", "resnet34"])
    def test_other_backbones(self, backbone: str) -> None:
        register()
        kwargs = {"patch_size": 8, "img_size": 16} if backbone == "vit_tiny" else {}
        model = build(backbone__name=backbone, backbone__kwargs=kwargs)
        assert model.cluster_head.in_features == model.features_dim
        model.training_step([None, crops(16, 16), torch.tensor([0, 1, 2, 3])], 0).backward()
        assert model.cluster_head.linear.weight.grad.norm() > 0


class _Views(Dataset[Any]):
    """Images drawn anew at every visit, as augmentations are, around a fixed one per item."""

    def __init__(self, n: int = 24, views: int = 2) -> None:
        self.images = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        self.views = views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        if not self.views:
            return self.images[i], i % 4
        return i, [self.images[i] + torch.randn(3, 8, 8) for _ in range(self.views)], i % 4


def trainer(folder: Path, epochs: int, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    return Trainer(max_epochs=epochs, default_root_dir=folder, **{**quiet, **options})


def loaders(workers: int = 0) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train = DataLoader(_Views(), batch_size=4, shuffle=True, drop_last=True, num_workers=workers)
    return train, DataLoader(_Views(10, views=0), batch_size=4)


class _Endless(IterableDataset[Any]):
    """The views of `_Views` in order, without a length."""

    def __iter__(self) -> Iterator[Any]:
        views = _Views()
        yield from (views[i] for i in range(len(views)))


class TestTraining:
    def test_a_loader_without_length(self, tmp_path: Path) -> None:
        """Each batch once, resumed as uninterrupted; only a moving momentum needs the length."""
        still = {"momentum": {"base_tau": 0.9, "final_tau": 0.9}, "max_epochs": 3}
        batches = DataLoader(_Endless(), batch_size=4)

        def run(epochs: int, **options: Any) -> tuple[Trainer, C2BIN, list[int]]:
            torch.manual_seed(0)
            fit, model = trainer(tmp_path, epochs), C2BIN(config(**still))
            first: list[int] = []
            step = model.training_step

            def spy(batch: Any, batch_idx: int) -> Any:
                first.append(int(batch[0][0]))
                return step(batch, batch_idx)

            model.training_step = spy
            fit.fit(model, batches, **options)
            return fit, model, first

        _, whole, seen = run(3)
        assert seen == [0, 4, 8, 12, 16, 20] * 3
        half, _, _ = run(1)
        half.save_checkpoint(tmp_path / "half.ckpt")
        _, resumed, seen = run(3, ckpt_path=tmp_path / "half.ckpt")
        assert seen == [0, 4, 8, 12, 16, 20] * 2
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        with pytest.raises(ValueError, match=r"momentum.final_tau.* max_epochs=2, .*inf batches"):
            trainer(tmp_path, 2).fit(C2BIN(config()), batches)

    @pytest.mark.parametrize(
        ("batch", "came"),
        [
            (crops(16, 16), "[a tensor of shape (4, 3, 16, 16), a tensor"),
            ([torch.arange(4), crops(16, 16)], "[a tensor of shape (4,), [a tensor"),
            ([None, crops(16, 16, 16), torch.arange(4)], "[NoneType, [a tensor of shape (4, 3,"),
        ],
    )
    def test_other_batches_are_named(self, batch: Any, came: str) -> None:
        with pytest.raises(ValueError, match=r"training batch: expected .indices, 2 crops") as told:
            build().training_step(batch, 0)
        assert came in str(told.value)

    def test_more_large_crops_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"data.num_large_crops: expected 2, .* got 3"):
            build(data__num_large_crops=3)

    def test_heads_run_once_for_each_view_of_each_network(self) -> None:
        model = build()
        calls: list[int] = []
        model.cluster_head.register_forward_hook(lambda *_: calls.append(1))
        model.training_step([None, crops(16, 16), torch.tensor([0, 1, 2, 3])], 0)
        assert len(calls) == 4

    def test_validation_scores_every_head_and_not_in_the_sanity_check(self, tmp_path: Path) -> None:
        fit = trainer(tmp_path, 1, num_sanity_val_steps=2)
        model = C2BIN(config(max_epochs=1))
        seen: list[int] = []
        update = model.cluster_monitor.update

        def spy(assignments: Any, labels: Tensor, other_view: Any = None) -> None:
            seen.append(len(labels))
            update(assignments, labels, other_view)

        model.cluster_monitor.update = spy
        fit.fit(model, *loaders())
        assert seen == [4, 4, 2]
        metrics = fit.callback_metrics
        for head in ("0_of_3", "1_of_5"):
            for score in ("nmi", "acc", "purity", "ari", "agreement"):
                assert -1 <= metrics[f"val_{score}_{head}"] <= 1
            assert 1 <= metrics[f"val_effective_clusters_{head}"] <= 5
        assert "val_acc1" in metrics

    def test_warns_of_more_clusters_than_images(self, tmp_path: Path) -> None:
        model = C2BIN(config(method_kwargs={**KWARGS, "num_clusters": [3, 9]}, max_epochs=1))
        with pytest.warns(UserWarning, match="9 clusters but a global batch has 4 images"):
            trainer(tmp_path, 1, limit_train_batches=1).fit(model, loaders()[0])

    @pytest.mark.parametrize("scheduler", ["none", "warmup_cosine"])
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_a_resumed_run_ends_with_the_same_weights(
        self, tmp_path: Path, scheduler: str, workers: int, accumulate: int
    ) -> None:
        options = {"scheduler__name": scheduler, "max_epochs": 3}
        options["accumulate_grad_batches"] = accumulate

        def run(epochs: int, checkpoint: Path | None) -> tuple[Trainer, C2BIN]:
            torch.manual_seed(0)
            fit = trainer(tmp_path, epochs, accumulate_grad_batches=accumulate)
            model = C2BIN(config(**options))
            # The schedules of a run that is killed are those of the whole run.
            fit.fit_loop.max_epochs = 3
            model.on_train_epoch_end = lambda: fit.save_checkpoint(
                tmp_path / f"{fit.current_epoch}.ckpt"
            )
            if epochs < 3:
                step = model.training_step

                def killed(batch: Any, batch_idx: int) -> Tensor:
                    if fit.current_epoch == epochs and batch_idx == 2:
                        raise KeyboardInterrupt
                    return step(batch, batch_idx)

                model.training_step = killed
            try:
                fit.fit(model, *loaders(workers), ckpt_path=checkpoint)
            except (KeyboardInterrupt, SystemExit):
                assert epochs < 3
            return fit, model

        _, whole = run(3, None)
        expected = {name: value.clone() for name, value in whole.state_dict().items()}
        first = torch.load(tmp_path / "0.ckpt", weights_only=True)
        (tmp_path / "1.ckpt").unlink()
        run(1, None)
        assert not (tmp_path / "1.ckpt").exists()
        again = torch.load(tmp_path / "0.ckpt", weights_only=True)
        assert again["global_step"] == first["global_step"]
        fit, resumed = run(3, tmp_path / "0.ckpt")
        assert fit.current_epoch == 3
        assert set(expected) == set(resumed.state_dict())
        for name, value in resumed.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)
        assert resumed.momentum_updater.cur_tau == whole.momentum_updater.cur_tau

    def test_epochs_differ_in_order_and_augmentation(self, tmp_path: Path) -> None:
        drawn: list[tuple[list[int], float]] = []
        model = C2BIN(config())
        step = model.training_step

        def spy(batch: Any, batch_idx: int) -> Tensor:
            drawn.append((batch[0].tolist(), float(batch[1][0].sum())))
            return step(batch, batch_idx)

        model.training_step = spy
        trainer(tmp_path, 2).fit(model, loaders()[0])
        assert drawn[0][0] != drawn[6][0]
        assert len({value for _, value in drawn}) == len(drawn) == 12

    def test_checkpoints_are_plain_and_refuse_other_options(self, tmp_path: Path) -> None:
        adamw = {"name": "adamw", "kwargs": {"betas": [0.9, 0.95]}, "lr": 0.01, "batch_size": 4}
        adamw |= {"weight_decay": 0.1, "classifier_lr": 0.1}
        options = {"optimizer": adamw, "scheduler__lr_decay_steps": [1]}
        fit, model = trainer(tmp_path, 1), C2BIN(config(scheduler__name="step", **options))
        # Some versions of torch make plain what they are given.
        assert type(model.extra_optimizer_args["betas"]) is list
        fit.fit(model, loaders()[0])
        fit.save_checkpoint(tmp_path / "a.ckpt")
        content = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert content["c2bin_method_kwargs"]["temperature"] == 0.1
        other = C2BIN(config(method_kwargs={**KWARGS, "temperature": 0.25}, **options))
        with pytest.raises(ValueError, match=r"temperature 0.1 -> 0.25"):
            trainer(tmp_path, 2).fit(other, loaders()[0], ckpt_path=tmp_path / "a.ckpt")

    def test_a_checkpoint_cut_off_leaves_the_one_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = trainer(tmp_path, 1)
        run.fit(build(), *loaders())
        path = tmp_path / "last.ckpt"
        run.save_checkpoint(path)
        whole = path.read_bytes()

        def killed(io: TorchCheckpointIO, checkpoint: Any, path: Any, options: Any) -> None:
            Path(path).write_bytes(whole[: len(whole) // 2])
            raise KeyboardInterrupt

        monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint(path)
        assert path.read_bytes() == whole

    @pytest.mark.parametrize("method", ["c2bin", "byol"])
    def test_load_backbone(self, tmp_path: Path, method: str) -> None:
        register()
        parts = ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim")
        cfg = config(method=method, method_kwargs={name: KWARGS[name] for name in parts})
        fit, model = trainer(tmp_path, 1), METHODS[method](cfg)
        fit.fit(model, loaders()[0])
        fit.save_checkpoint(tmp_path / "a.ckpt")
        fresh = METHODS[method](cfg)
        for prefix, trained in (
            ("backbone.", model.backbone),
            ("momentum_backbone.", model.momentum_backbone),
        ):
            loaded = load_backbone(tmp_path / "a.ckpt", fresh.backbone, prefix=prefix)
            for name, value in trained.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], value)
        with pytest.raises(ValueError, match="fit the backbone"):
            load_backbone(tmp_path / "a.ckpt", METHODS[method]._BACKBONES["resnet50"](method))

    def test_bfloat16(self, tmp_path: Path) -> None:
        fit = trainer(tmp_path, 1, precision="bf16-mixed")
        fit.fit(C2BIN(config(max_epochs=1)), *loaders())
        assert all(value.isfinite() for value in fit.callback_metrics.values())


def environment() -> dict[str, str]:
    paths = [str(INTEGRATIONS.parent), str(INTEGRATIONS), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }


def python(*arguments: str, cwd: Path, ok: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output[-3000:]
    return output


class TestRanks:
    PROGRAM = """
        import json
        import sys
        import warnings

        warnings.simplefilter("ignore")
        sys.path.insert(0, TESTS)
        from test_solo import C2BIN, DataLoader, _Views, config, torch, trainer

        devices = int(sys.argv[1])
        torch.manual_seed(0)
        run = trainer(".", 1, devices=devices, strategy="ddp" if devices > 1 else "auto")
        run.validate(C2BIN(config()), DataLoader(_Views(11, views=0), batch_size=2), verbose=False)
        if run.is_global_zero:
            scores = {k: float(v) for k, v in run.callback_metrics.items() if "_of_" in k}
            print("SCORES", json.dumps(scores))
    """

    def test_scores_do_not_count_images_twice(self, tmp_path: Path) -> None:
        program = f"TESTS = {str(Path(__file__).parent)!r}\n" + textwrap.dedent(self.PROGRAM)
        (tmp_path / "program.py").write_text(program)
        scores = []
        for devices in ("1", "2"):
            lines = python("program.py", devices, cwd=tmp_path).splitlines()
            (line,) = [line for line in lines if line.startswith("SCORES")]
            scores.append(json.loads(line.partition(" ")[2]))
        assert len(scores[0]) == 2 * 7
        assert scores[1] == pytest.approx(scores[0], rel=1e-5)


class TestHydraPlugin:
    PROGRAM = """
        import sys
        import hydra

        @hydra.main(version_base="1.2", config_path=None)
        def main(cfg):
            names = {name.partition(".")[0] for name in sys.modules}
            print(sorted(names & {"torch", "solo", "c2bin_solo", "c2bin_ext", "numpy"}))
            print(any(name.startswith("hydra_plugins.c2bin") for name in sys.modules))
            from hydra.core.hydra_config import HydraConfig
            print([source.provider for source in HydraConfig.get().runtime.config_sources])

        main()
    """

    def test_does_nothing_in_another_program(self, tmp_path: Path) -> None:
        (tmp_path / "program.py").write_text(textwrap.dedent(self.PROGRAM))
        lines = python("program.py", "hydra.run.dir=.", cwd=tmp_path).splitlines()
        assert lines[:2] == ["[]", "True"]
        assert "c2bin" not in lines[2]

    def test_acts_where_solo_s_methods_are_imported(self, tmp_path: Path) -> None:
        program = "import solo.methods\n" + textwrap.dedent(self.PROGRAM)
        (tmp_path / "program.py").write_text(program)
        assert "'c2bin-ext'" in python("program.py", "hydra.run.dir=.", cwd=tmp_path)


class TestPackage:
    def test_without_solo_learn_the_error_says_what_to_install(self, tmp_path: Path) -> None:
        code = "import sys; sys.modules['solo'] = None; import c2bin_solo"
        output = python("-c", code, cwd=tmp_path, ok=False)
        assert "ImportError" in output
        assert "git+https://github.com/vturrisi/solo-learn" in output

    def test_launcher_names_a_missing_script(self, tmp_path: Path) -> None:
        assert "no_such.py" in python("-m", "c2bin_solo", "no_such.py", cwd=tmp_path, ok=False)
        assert "usage" in python("-m", "c2bin_solo", cwd=tmp_path, ok=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes, as many as main_linear needs, of 12 and 3 images of noise, 32 pixels wide."""
    root = tmp_path_factory.mktemp("images")
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 3)):
        for label in range(5):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(45 * label, 45 * label + 75, (32, 32, 3), generator=draw)
                Image.fromarray(pixels.byte().numpy()).save(folder / f"{number}.png")
    return root


def arguments(images: Path, *more: str, name: str = "c2bin-cifar10") -> list[str]:
    linear = "linear" in name
    common = [
        *("--config-name", name, "accelerator=cpu", "strategy=auto", "precision=32"),
        *("sync_batchnorm=False", "devices='1'", "data.dataset=custom", "data.num_workers=1"),
        *(f"data.train_path={images}/train", f"data.val_path={images}/test"),
        *("optimizer.batch_size=8", "max_epochs=2"),
    ]
    pretraining = ["augmentations=c2bin-32", "method_kwargs.num_clusters=[4,8]"]
    return [*common, *([] if linear else pretraining), *more]


def checkpoint(folder: Path, epoch: int = 1, method: str = "c2bin") -> Path:
    (found,) = folder.glob(f"trained_models/{method}/*/*ep={epoch}.ckpt")
    return found


@needs_checkout
class TestScripts:
    @pytest.fixture(scope="class")
    def trained(self, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A run of the unmodified script with nothing but the configs' name."""
        folder = tmp_path_factory.mktemp("run")
        python(f"{CHECKOUT}/main_pretrain.py", *arguments(images), cwd=folder)
        return folder

    def test_pretrains_and_writes_every_option(self, trained: Path) -> None:
        args = json.loads((checkpoint(trained).parent / "args.json").read_text())
        assert args["method"] == "c2bin"
        assert args["method_kwargs"]["num_clusters"] == [4, 8]
        assert args["method_kwargs"]["gather_distributed"] is True

    def test_linear_evaluation(self, trained: Path, images: Path) -> None:
        given = f"pretrained_feature_extractor='{checkpoint(trained)}'"
        more = arguments(images, given, "++limit_train_batches=1", name="c2bin-linear-cifar10")
        python(f"{CHECKOUT}/main_linear.py", *more, cwd=trained)
        assert checkpoint(trained, method="linear").is_file()

    def test_knn_and_umap(self, trained: Path, images: Path) -> None:
        common = ["--dataset", "custom", "--train_data_path", f"{images}/train"]
        common += ["--val_data_path", f"{images}/test", "--num_workers", "0"]
        common += ["--pretrained_checkpoint_dir", str(checkpoint(trained).parent)]
        knn = ["--k", "2", "--distance_function", "euclidean", "--feature_type", "backbone"]
        launcher = ("-m", "c2bin_solo")
        output = python(*launcher, f"{CHECKOUT}/main_knn.py", *common, *knn, cwd=trained)
        assert "Result: acc@1=" in output
        python(*launcher, f"{CHECKOUT}/main_umap.py", *common, cwd=trained)
        assert (trained / "im100_val_umap.pdf").is_file()

    @pytest.mark.parametrize("launcher", [(), ("-m", "c2bin_solo")])
    def test_two_processes(self, images: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
        more = ["strategy=ddp", "devices='2'", "max_epochs=1"]
        more += ["optimizer.batch_size=4", "+knn_eval.enabled=True", "+accumulate_grad_batches=2"]
        script = f"{CHECKOUT}/main_pretrain.py"
        python(*launcher, script, *arguments(images, *more), cwd=tmp_path)
        state = torch.load(checkpoint(tmp_path, epoch=0), weights_only=True)
        # 60 images, 30 for each process: 7 batches of 4, so 4 steps of two batches and less.
        assert state["global_step"] == 4

    def test_solo_learn_s_own_config_folder(self, images: Path, tmp_path: Path) -> None:
        path = ["--config-path", f"{CHECKOUT}/scripts/pretrain/cifar"]
        more = arguments(images, "max_epochs=1", "++limit_train_batches=1")
        python(f"{CHECKOUT}/main_pretrain.py", *path, *more, cwd=tmp_path)
        args = json.loads((checkpoint(tmp_path, epoch=0).parent / "args.json").read_text())
        assert args["augmentations"][0]["gaussian_blur"]["prob"] == 0.0
        assert args["wandb"]["enabled"] is False

    def test_images_without_labels(self, images: Path, tmp_path: Path) -> None:
        flat = images / "train" / "class0"
        more = [f"data.train_path={flat}", "data.no_labels=True", "data.val_path=null"]
        more = arguments(images, *more, "max_epochs=1", name="c2bin-custom")
        python(f"{CHECKOUT}/main_pretrain.py", *more, cwd=tmp_path)
        state = torch.load(checkpoint(tmp_path, epoch=0), weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())

    def test_killed_in_the_middle_of_an_epoch(
        self, trained: Path, images: Path, tmp_path: Path
    ) -> None:
        command = [sys.executable, f"{CHECKOUT}/main_pretrain.py", *arguments(images)]
        with (tmp_path / "log").open("wb") as log:
            run = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
            for _ in range(6000):
                if list(tmp_path.glob("trained_models/c2bin/*/*ep=0.ckpt")) or run.poll():
                    break
                time.sleep(0.05)
            time.sleep(0.3)
            run.send_signal(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
        output = python(*command[1:], cwd=tmp_path)
        assert "Resuming from previous checkpoint" in output
        whole = torch.load(checkpoint(trained), weights_only=True)["state_dict"]
        resumed = torch.load(checkpoint(tmp_path), weights_only=True)["state_dict"]
        assert set(whole) == set(resumed)
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), name
