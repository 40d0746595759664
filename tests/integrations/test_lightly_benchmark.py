"""c2bin_lightly in lightly's benchmarks: their contract, the scores of heads, kill and resume.

The tests against lightly's scripts themselves, which are not in its pip package, run where
LIGHTLY_CHECKOUT names a checkout of its git repository.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import os
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("lightly")

import c2bin_lightly
from c2bin_lightly import __main__ as launcher
from c2bin_lightly import benchmark, load_backbone, register
from lightly.utils.benchmarking import KNNClassifier, LinearClassifier, MetricCallback
from pytorch_lightning import Callback, LightningModule, Trainer
from sklearn.metrics import normalized_mutual_info_score

# Lightning's own calls of what torch and the operating system are about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*clusters but a global batch.*"),
    pytest.mark.filterwarnings("ignore:Cluster head .* has collapsed"),
]

FORMS = ("SimCLRBenchmark", "MoCoV2Benchmark", "BYOLBenchmark", "C2BINBenchmark")
OPTIONS: dict[str, dict[str, Any]] = {
    "MoCoV2Benchmark": {"queue_size": 16},
    "C2BINBenchmark": {"num_clusters": (3, 5)},
}
CLASSES = 6
KNN: dict[str, Any] = {
    **{"num_classes": CLASSES, "knn_k": 1, "knn_t": 0.1, "topk": (1,)},
    **{"train_dataloader_idx": 0, "val_dataloader_idx": 1},
}


class Images(Dataset[Any]):
    """Images of six classes as lightly's datasets give them: (image or views, label, name)."""

    def __init__(self, n: int = 24, views: int = 0, seed: int = 7) -> None:
        draw = torch.Generator().manual_seed(seed)
        means = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(n) % CLASSES
        self.images = means[self.labels] + 0.5 * torch.randn(n, 3, 4, 4, generator=draw)
        self.views = views

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, int, str]:
        image = self.images[i]
        given = [image + 0.1 * k for k in range(self.views)] if self.views else image
        return given, int(self.labels[i]), f"{i}.jpg"


def batches(n: int = 24, views: int = 0, batch_size: int = 8, seed: int = 7) -> DataLoader[Any]:
    return DataLoader(Images(n, views, seed), batch_size=batch_size)


def backbone() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Tanh())


def trainer(epochs: int = 1, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    return Trainer(max_epochs=epochs, **{**quiet, **options})


class Scores(Callback):
    """What is logged by the end of each validation: lightly's MetricCallback comes before that."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.epochs.append(values)


def form(name: str, bank: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_dim": 12, "projection_dim": 6, **OPTIONS.get(name, {})}
    return getattr(c2bin_lightly, name)(
        batches() if bank is None else bank,
        CLASSES,
        knn_k=5,
        backbone=backbone(),
        feature_dim=8,
        **{**sizes, **options},
    )


class SmallResNet(nn.Module):
    """Stands in for ResNet-50: its 2048 features, in a thousandth of its time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 2048), nn.BatchNorm1d(2048))
        self.fc: nn.Module = nn.Linear(2048, 1000)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.fc(self.body(images))
        return features


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "resnet50", SmallResNet)


class TestImageNetForm:
    """What lightly's benchmarks/imagenet/resnet50/main.py asks of a method."""

    def test_registration(self) -> None:
        with_knn: dict[str, Any] = {}
        without: dict[str, Any] = {"byol": {}}
        register(with_knn)
        register(without, online_knn=False)
        # The script's own words for the two contracts that it knows.
        asked = inspect.signature(with_knn["c2bin"]["model"].__init__).parameters.keys()
        assert {"batch_size_per_device", "num_classes", "knn_k", "knn_t"} <= asked
        asked = inspect.signature(without["c2bin"]["model"].__init__).parameters.keys()
        assert {"batch_size_per_device", "num_classes"} <= asked
        assert not {"knn_k", "knn_t"} & asked
        assert with_knn["c2bin"]["transform"] is c2bin_lightly.transform
        assert set(without) == {"byol", "c2bin"}

    def test_scripts_that_know_no_online_knn_build_it_too(self, small: None) -> None:
        methods: dict[str, Any] = {}
        register(methods, num_clusters=(3, 5))
        model = methods["c2bin"]["model"](batch_size_per_device=8, num_classes=CLASSES)
        assert model.knn_classifier is None

    @pytest.mark.parametrize("online_knn", [True, False])
    def test_what_is_registered_can_be_pickled(self, small: None, online_knn: bool) -> None:
        methods: dict[str, Any] = {}
        register(methods, online_knn=online_knn, num_clusters=(3, 5), normalize=True)
        kind = methods["c2bin"]["model"]
        again = pickle.loads(pickle.dumps(kind))
        assert again.__name__ == kind.__name__
        given, expected = (inspect.signature(k.__init__).parameters.keys() for k in (again, kind))
        assert given == expected
        model = kind(batch_size_per_device=8, num_classes=CLASSES)
        copied = pickle.loads(pickle.dumps(model))
        assert copied.cluster_head.num_clusters == (3, 5)
        assert again(8, CLASSES).cluster_head.normalize
        for name, tensor in model.state_dict().items():
            assert torch.equal(copied.state_dict()[name], tensor), name

    def test_unlabelled_batches_are_named(self, small: None, complains: Any) -> None:
        model = c2bin_lightly.C2BINResNet50(8, CLASSES, num_clusters=(3, 5))
        views = torch.randn(2, 8, 3, 4, 4)
        with complains(ValueError, "training batch", "labels", "[[a tensor"):
            model.training_step([[*views]], 0)

    def test_mistakes_are_named(self, small: None, complains: Any) -> None:
        methods: dict[str, Any] = {}
        with complains(TypeError, "clusters", "num_clusters"):
            register(methods, clusters=(3, 5))
        register(methods)
        with complains(ValueError, "c2bin", "already"):
            register(methods)
        with complains(ValueError, "knn_k", "knn_t", "both or neither"):
            c2bin_lightly.C2BINResNet50(8, CLASSES, knn_k=5)

    def test_transform_gives_two_views_of_224_pixels(self) -> None:
        from PIL import Image

        views = c2bin_lightly.transform(Image.new("RGB", (300, 260), "red"))
        assert [tuple(view.shape) for view in views] == [(3, 224, 224), (3, 224, 224)]

    def test_backbone_is_resnet50_without_its_classifier(self) -> None:
        model = c2bin_lightly.C2BINResNet50(8, CLASSES, num_clusters=(3, 5)).eval()
        with torch.no_grad():
            assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2048)
        assert sum(p.numel() for p in model.backbone.parameters()) == 23_508_032
        assert model.online_classifier.feature_dim == 2048

    def test_numbers_of_table_7_and_of_lightlys_byol(self, small: None) -> None:
        model = c2bin_lightly.C2BINResNet50(64, CLASSES)
        assert model.cluster_head.num_clusters == (512, 1024, 2048)
        loss = model.criterion.loss
        assert loss.gather_distributed
        assert (loss.cluster_weight, loss.entropy_weight, loss.temperature) == (1.0, 0.05, 0.2)
        assert model.against == "runner"
        assert not model.cluster_head.normalize
        assert model.projector.layers[0].out_features == 4096
        assert (model.follower_momentum, model.follower_schedule) == (0.99, "cosine")

    def test_learning_rate_and_groups(self, small: None) -> None:
        rates: list[float] = []

        class Rates(Callback):
            def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        model = c2bin_lightly.C2BINResNet50(8, CLASSES, num_clusters=(3, 5))
        fitted = trainer(epochs=12, limit_train_batches=1, callbacks=[Rates()])
        fitted.fit(model, batches(views=2), batches())
        assert len(rates) == 12
        assert rates[0] == pytest.approx(0.45 * 8 / 256 / 10)  # the first of ten steps of warm-up
        assert max(rates) == pytest.approx(0.45 * 8 / 256)
        assert rates.index(max(rates)) == 9
        optimizer = model.optimizers().optimizer
        assert type(optimizer).__name__ == "LARS"
        groups = {group["name"]: group for group in optimizer.param_groups}
        decay = {name: group["weight_decay"] for name, group in groups.items()}
        assert decay == {"c2bin": 1e-6, "c2bin_no_weight_decay": 0.0, "online_classifier": 0.0}
        assert groups["online_classifier"]["params"] == list(model.online_classifier.parameters())
        inside = {id(p) for group in groups.values() for p in group["params"]}
        assert inside == {id(p) for p in model.parameters() if p.requires_grad}

    def test_logs_what_the_script_reads(self, small: None) -> None:
        methods: dict[str, Any] = {}
        register(methods, num_clusters=(3, 5))
        model = methods["c2bin"]["model"](
            batch_size_per_device=8, num_classes=CLASSES, knn_k=5, knn_t=0.1
        )
        metrics, scores = MetricCallback(), Scores()
        fitted = trainer(callbacks=[metrics, scores])
        fitted.fit(model, batches(views=2), [batches(), batches(12, seed=9)])
        assert len(metrics.train_metrics["train_loss"]) == 1
        assert len(metrics.val_metrics["val_online_cls_top1"]) == 1
        expected = {f"val_online_cls_{name}" for name in ("loss", "top1", "top5")}
        expected |= {f"val_knn_top{k}" for k in (1, 5)}
        kinds = ("nmi", "acc", "purity", "ari", "clusters_in_use", "effective_clusters")
        for head in ("0_of_3", "1_of_5"):
            expected |= {f"val_{kind}_{head}" for kind in (*kinds, "agreement")}
        assert expected <= set(scores.epochs[0])
        # The kNN is lightly's on these features.
        alone, found = MetricCallback(), metrics.val_metrics["val_knn_top1"][-1]
        knn = KNNClassifier(model, CLASSES, 5, 0.1, train_dataloader_idx=0, val_dataloader_idx=1)
        trainer(callbacks=[alone]).validate(knn, [batches(), batches(12, seed=9)], verbose=False)
        assert found == pytest.approx(alone.val_metrics["val_knn_top1/dataloader_idx_1"][0])
        assert found > 1 / CLASSES

    def test_without_knn_there_is_one_validation_loader(self, small: None) -> None:
        methods: dict[str, Any] = {}
        register(methods, online_knn=False, num_clusters=(3, 5))
        model = methods["c2bin"]["model"](batch_size_per_device=8, num_classes=CLASSES)
        scores = Scores()
        trainer(callbacks=[scores]).fit(model, batches(views=2), batches(12))
        assert {"val_online_cls_top1", "val_nmi_1_of_5"} <= set(scores.epochs[0])
        assert "val_knn_top1" not in scores.epochs[0]

    def test_labels_train_the_online_classifier_and_nothing_else(self, small: None) -> None:
        gradients = []
        for shift in (0, 1):
            torch.manual_seed(0)
            model = c2bin_lightly.C2BINResNet50(8, CLASSES, num_clusters=(3, 5))
            model.log_dict = lambda *_, **__: None
            views, labels, names = next(iter(batches(views=2)))
            model.training_step((views, (labels + shift) % CLASSES, names), 0).backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert all(gradient is not None for gradient in gradients[0].values())
        changed = {n for n, g in gradients[0].items() if not torch.equal(g, gradients[1][n])}
        online = {f"online_classifier.classification_head.{name}" for name in ("weight", "bias")}
        assert changed == online

    def test_checkpoint_reloads_without_code_and_gives_the_backbone(
        self, small: None, tmp_path: Path
    ) -> None:
        model = c2bin_lightly.C2BINResNet50(8, CLASSES, num_clusters=(3, 5))
        fitted = trainer(limit_train_batches=1)
        fitted.fit(model, batches(views=2), batches())
        fitted.save_checkpoint(tmp_path / "a.ckpt")
        again = c2bin_lightly.C2BINResNet50.load_from_checkpoint(
            tmp_path / "a.ckpt", weights_only=True
        )
        assert again.cluster_head.num_clusters == (3, 5)
        fresh = SmallResNet()
        fresh.fc = nn.Identity()
        load_backbone(tmp_path / "a.ckpt", fresh)
        for name, tensor in model.backbone.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], tensor), name
            assert torch.equal(again.backbone.state_dict()[name], tensor), name

    def test_mixed_precision_and_accumulation(self, small: None) -> None:
        model = c2bin_lightly.C2BINResNet50(8, CLASSES, num_clusters=(3, 5))
        before = copy.deepcopy(model.state_dict())
        metrics = MetricCallback()
        fitted = trainer(2, precision="bf16-mixed", accumulate_grad_batches=3, callbacks=[metrics])
        fitted.fit(model, batches(views=2), batches())
        assert fitted.global_step == 2  # of three batches each
        assert all(torch.isfinite(t).all() for t in model.state_dict().values())
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        assert {"backbone.body.1.weight", "criterion.head.linear.weight"} <= moved
        assert 0 < metrics.train_metrics["train_loss"][-1] < 50


SCRIPT = """
from argparse import ArgumentParser
import beside
METHODS = {"byol": {"model": None, "transform": None}}
parser = ArgumentParser("Stand-in")
parser.add_argument("--methods", nargs="+")
parser.add_argument("--epochs", type=int, default=100)
def main(methods, epochs):
    print("ran", methods, epochs, beside.FOUND, sorted(METHODS), METHODS["c2bin"]["model"].__name__)
"""


class TestLauncher:
    @pytest.fixture
    def script(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "beside.py").write_text("FOUND = 'its neighbour'\n")
        path = tmp_path / "stand_in.py"
        path.write_text(SCRIPT)
        monkeypatch.setattr(sys, "path", [*sys.path])
        for name in ("stand_in", "beside"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        return path

    def test_runs_the_script_with_c2bin_among_its_methods(self, script: Path) -> None:
        command = [sys.executable, "-m", "c2bin_lightly", "--num-clusters", "4,8", str(script)]
        done = subprocess.run(
            [*command, "--methods", "c2bin", "--epochs", "3"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        expected = "ran ['c2bin'] 3 its neighbour ['byol', 'c2bin'] WithKNN"
        assert done.stdout.splitlines()[-1] == expected

    def test_without_online_knn(self, script: Path, capsys: Any) -> None:
        launcher.main(["--no-online-knn", str(script), "--methods", "byol", "c2bin"])
        assert capsys.readouterr().out.endswith("WithoutKNN\n")

    def test_options_reach_the_method(
        self, script: Path, small: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = ["--num-clusters", "4,8", "--against", "follower", "--normalize"]
        launcher.main([*options, str(script)])
        model = sys.modules["stand_in"].METHODS["c2bin"]["model"](8, CLASSES, 5, 0.1)
        assert model.cluster_head.num_clusters == (4, 8)
        assert model.against == "follower"
        assert model.cluster_head.normalize

    def test_options_of_the_script_are_its_own(self, script: Path, capsys: Any) -> None:
        with pytest.raises(SystemExit):
            launcher.main([str(script), "--help"])
        assert "Stand-in" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("x = 1", "it has no METHODS and no main and no parser"),
            ("import not_installed_anywhere", "needs not_installed_anywhere"),
        ],
    )
    def test_what_is_no_benchmark_is_refused(self, script: Path, text: str, expected: str) -> None:
        script.write_text(text)
        with pytest.raises(SystemExit, match=expected):
            launcher.main([str(script)])

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [(["none.py"], "no file none.py"), (["--num-clusters", "4,1", "x.py"], "at least 2")],
    )
    def test_mistakes_are_named(self, arguments: list[str], expected: str, capsys: Any) -> None:
        with pytest.raises(SystemExit) as caught:
            launcher.main(arguments)
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err


class NestedKNN(LightningModule):
    """A method with lightly's kNN inside, as in lightly's own SimCLR."""

    def __init__(self) -> None:
        super().__init__()
        self.knn_classifier = KNNClassifier(None, **KNN)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        images, labels, _ = batch
        features = (images.flatten(start_dim=1), labels)
        scores = self.knn_classifier.validation_step(features, batch_idx, dataloader_idx)
        if scores is not None:
            own = {f"own_{name}": value for name, value in scores.items()}
            self.log_dict(own, batch_size=len(labels))


def test_launcher_lets_a_method_log_for_the_knn_inside_of_it() -> None:
    loaders = [batches(), batches(seed=8)]
    with launcher.quiet_nested_knn():
        (_, found) = trainer().validate(NestedKNN(), loaders, verbose=False)
        alone = KNNClassifier(nn.Flatten(), **KNN)
        (_, logged) = trainer().validate(alone, loaders, verbose=False)
    assert list(found.values()) == list(logged.values())
    assert next(iter(found)).startswith("own_val_knn_top1")
    assert next(iter(logged)).startswith("val_knn_top1")
    # And lightly is left as it was.
    with pytest.raises(Exception, match=r"not managed by the `Trainer` control flow"):
        trainer().validate(NestedKNN(), loaders, verbose=False)


@pytest.mark.parametrize("name", FORMS)
class TestCifarForm:
    def test_keeps_the_best_accuracy_of_lightlys_knn(self, name: str) -> None:
        model = form(name)
        scores = Scores()
        trainer(epochs=3, callbacks=[scores]).fit(model, batches(views=2), batches(12, seed=9))
        accuracies = [epoch["kNN_accuracy"] for epoch in scores.epochs]
        assert len(accuracies) == 3
        assert model.max_accuracy == pytest.approx(max(accuracies) / 100)
        assert accuracies[-1] == pytest.approx(100 * self.knn(model), abs=1e-4)

    def test_the_sanity_check_is_no_result(self, name: str) -> None:
        class Spy(Callback):
            def on_sanity_check_end(self, trainer: Trainer, module: Any) -> None:
                assert module.max_accuracy == 0.0

        model = form(name)
        scores = Scores()
        # Of 2 of the batches the untrained network may get everything right.
        model.dataloader_kNN = batches(12, seed=9)
        trainer(num_sanity_val_steps=2, callbacks=[Spy(), scores], limit_val_batches=2).fit(
            model, batches(views=2), batches(12, seed=9)
        )
        assert scores.epochs[0]["kNN_accuracy"] > 0
        assert model.max_accuracy == pytest.approx(scores.epochs[0]["kNN_accuracy"] / 100)

    @pytest.mark.parametrize("where", ["bank", "validation"])
    def test_what_cannot_be_scored_is_refused(self, name: str, where: str, complains: Any) -> None:
        loaders: dict[str, Any] = {"bank": batches(), "validation": batches(12)}
        loaders[where].dataset.labels[3] = -1
        told = {"bank": "dataloader_kNN", "validation": "validation images"}[where]
        with complains(ValueError, told, "class", "below 0"):
            trainer().validate(form(name, loaders["bank"]), loaders["validation"], verbose=False)
        loaders = {"bank": batches(), "validation": batches(12)}
        loaders[where].dataset.images[3, 1] = float("nan")
        with complains(ValueError, told, "finite"):
            trainer().validate(form(name, loaders["bank"]), loaders["validation"], verbose=False)

    @staticmethod
    @torch.no_grad()
    def knn(model: Any) -> float:
        """Weighted votes of the five nearest, one image at a time."""
        model.eval()
        bank, test = Images(24), Images(12, seed=9)
        features, right = model(bank.images), 0
        for image, label in zip(test.images, test.labels, strict=True):
            cosines = torch.cosine_similarity(model(image[None]), features)
            votes = torch.zeros(CLASSES)
            for i in cosines.argsort(descending=True)[:5]:
                votes[bank.labels[i]] += (cosines[i] / 0.1).exp()
            right += int(votes.argmax() == label)
        return right / len(test)

    def test_lightlys_evaluations_take_it(self, name: str) -> None:
        model = form(name)
        before = copy.deepcopy(model.backbone.state_dict())
        linear = LinearClassifier(model, 8, lr=20.0, feature_dim=8, num_classes=CLASSES)
        metrics = MetricCallback()
        trainer(epochs=30, callbacks=[metrics]).fit(linear, batches(), batches(12, seed=9))
        assert max(metrics.val_metrics["val_top1"]) > 0.6
        for key, tensor in model.backbone.state_dict().items():
            assert torch.equal(tensor, before[key]), key
        knn = KNNClassifier(model, CLASSES, 5, 0.1, train_dataloader_idx=0, val_dataloader_idx=1)
        scored = trainer()
        scored.validate(knn, [batches(), batches(12, seed=9)], verbose=False)
        assert float(scored.callback_metrics["val_knn_top1/dataloader_idx_1"]) > 1 / CLASSES

    def test_checkpoint_holds_no_data_and_reloads(self, name: str, tmp_path: Path) -> None:
        model = form(name, lr=0.3)
        fitted = trainer(2)
        fitted.fit(model, batches(views=2), batches())
        fitted.save_checkpoint(tmp_path / "a.ckpt")
        again = type(model).load_from_checkpoint(
            tmp_path / "a.ckpt", dataloader_kNN=batches(), backbone=backbone(), weights_only=True
        )
        assert (again.knn_k, again.num_classes, again.optimization["lr"]) == (5, CLASSES, 0.3)
        assert again.max_accuracy == model.max_accuracy > 0
        for key, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), key
        follower = "backbone." if name == "SimCLRBenchmark" else "follower_backbone."
        for prefix in ("backbone.", follower):
            loaded = load_backbone(tmp_path / "a.ckpt", backbone(), prefix=prefix)
            expected = getattr(model, prefix[:-1]).state_dict()
            for key, tensor in expected.items():
                assert torch.equal(loaded.state_dict()[key], tensor), key


def test_the_order_of_a_benchmark_s_bases_makes_no_difference() -> None:
    kind = c2bin_lightly.C2BINBenchmark.__mro__[1]
    ours, lightlys = (vars(base) for base in kind.__bases__)
    assert not {n for n in {*ours} & {*lightlys} if not n.startswith("__")}


class TestScoresOfHeads:
    @pytest.mark.parametrize("kind", ["plain", "benchmark"])
    def test_are_those_of_the_validation_images(self, kind: str) -> None:
        model = form("C2BINBenchmark")
        if kind == "plain":
            torch.manual_seed(0)
            model = c2bin_lightly.C2BIN(backbone(), 8, num_clusters=(3, 5), hidden_dim=12)
        scores = Scores()
        trainer(epochs=2, callbacks=[scores]).fit(model, batches(views=2), batches(20, seed=9))
        model.eval()
        images, labels = Images(20, seed=9).images, Images(20, seed=9).labels
        with torch.no_grad():
            heads, mirrored = model.assignments(images), model.assignments(images.flip(-1))
        for head, k in enumerate((3, 5)):
            clusters = heads[head].argmax(dim=1)
            found = {
                name: scores.epochs[-1][f"val_{name}_{head}_of_{k}"]
                for name in ("nmi", "clusters_in_use", "agreement")
            }
            nmi = normalized_mutual_info_score(labels.numpy(), clusters.numpy())
            assert found["nmi"] == pytest.approx(nmi, abs=1e-6)
            assert found["clusters_in_use"] == len(set(clusters.tolist()))
            same = (clusters == mirrored[head].argmax(dim=1)).double().mean()
            assert found["agreement"] == pytest.approx(float(same))

    def test_of_several_loaders_the_last_counts(self) -> None:
        torch.manual_seed(0)
        model = c2bin_lightly.C2BIN(backbone(), 8, num_clusters=(3, 5), hidden_dim=12)
        seen: list[Tensor] = []
        update = model.monitor.update

        def spy(assignments: Any, labels: Tensor, other_view: Any = None) -> None:
            seen.append(labels)
            update(assignments, labels, other_view)

        model.monitor.update = spy
        trainer(num_sanity_val_steps=0).fit(model, batches(views=2), [batches(24), batches(10)])
        assert sum(len(labels) for labels in seen) == 10

    def test_nothing_in_the_sanity_check_and_a_word_after_the_epoch(self) -> None:
        model = form("C2BINBenchmark", lr=0.0)
        with torch.no_grad():
            model.cluster_head.linear.weight.zero_()  # the same assignment for every image
        logged: list[set[str]] = []

        class Watch(Callback):
            def on_sanity_check_end(self, trainer: Trainer, *_: Any) -> None:
                logged.append({name for name in trainer.callback_metrics if "_of_" in name})
                assert not [w for w in caught if "collapsed" in str(w.message)]

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(callbacks=[Watch()]).fit(model, batches(views=2), batches())
        assert logged == [set()]
        said = [str(w.message) for w in caught if "collapsed" in str(w.message)]
        assert {text.split(" has")[0] for text in said} == {
            "Cluster head 0 of 3 clusters",
            "Cluster head 1 of 5 clusters",
        }

    def test_training_without_validation_images_is_silent(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer().fit(c2bin_lightly.C2BIN(backbone(), 8, num_clusters=(3,)), batches(views=2))
        assert not [w for w in caught if "val_dataloader" in str(w.message)]


RUN = """
import logging, multiprocessing, os, random, signal, sys, warnings
from pathlib import Path
import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, Dataset
import c2bin_lightly

warnings.filterwarnings("ignore")
warnings.filterwarnings("error", message=".*sync_dist.*")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
torch.set_num_threads(1)
folder, devices = Path(sys.argv[2]), int(sys.argv[3])


class Views(Dataset):
    # Augmented from each of the three generators that transforms draw from.
    images = torch.randn(46, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    def __len__(self):
        return 46
    def __getitem__(self, i):
        noise = torch.randn(2, 3, 4, 4) * float(np.random.rand()) * random.random()
        return tuple(self.images[i] + noise), i % 4


class Plain(Views):
    def __len__(self):
        return 9  # no multiple of two processes
    def __getitem__(self, i):
        return self.images[i], i % 4


class Kill(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(mode, kind, workers, validates):
    here = folder / ("whole" if mode == "whole" else "killed") / f"{kind}-{workers}-{validates}"
    seed_everything(3, workers=True, verbose=False)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
    own = {"C2BIN": {"num_clusters": (3, 5)}, "MoCoV2": {"queue_size": 24}}[kind]
    model = getattr(c2bin_lightly, kind)(
        backbone, 8, hidden_dim=12, projection_dim=6, follower_schedule="cosine",
        optimizer="lars", lr=0.3, warmup_epochs=1, **own)
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", devices=devices, logger=False,
        strategy="ddp" if devices > 1 else "auto", default_root_dir=here,
        callbacks=[Kill()] if mode == "kill" else None,
        enable_progress_bar=False, enable_model_summary=False)
    def load(images, **options):
        # A fork of a process with gloo's threads can inherit a lock that nobody will release.
        context = "forkserver" if workers and devices > 1 else None
        return DataLoader(images, batch_size=12 // devices, num_workers=workers,
                          multiprocessing_context=context, persistent_workers=workers > 0,
                          **options)
    last = max(here.glob("**/*.ckpt")) if mode == "resume" else None
    trainer.fit(model, load(Views(), shuffle=True, drop_last=True),
                load(Plain()) if validates else None, ckpt_path=last)
    if trainer.is_global_zero:
        scores = {k: float(v) for k, v in trainer.callback_metrics.items() if "_of_" in k}
        torch.save([model.state_dict(), scores], here / f"{mode}.pt")


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["c2bin_lightly"])
    for mode in sys.argv[1].split("+"):
        for kind in sys.argv[4:]:
            name, workers, validates = kind.split(",")
            run(mode, name, int(workers), int(validates))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
"""

# Method, loader workers, whether there are validation images: Lightning writes its checkpoint
# after the validation of an epoch, or, without, at the end of the epoch, and resumes differently.
CASES = {1: ["C2BIN,1,0", "MoCoV2,0,1"], 2: ["C2BIN,1,1"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Path]]:
    """Results of runs that were left alone, and of runs that were killed and resumed."""
    top = tmp_path_factory.mktemp("resume")
    script = top / "run.py"
    script.write_text(RUN)
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK")}
    environment["OMP_NUM_THREADS"] = "1"

    def start(modes: str, devices: int, *cases: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, script, modes, top / str(devices), str(devices), *cases]
        # To a file: a pipe would be open as long as a rank that waits for a dead one, and its
        # workers, live.
        with (top / "errors").open("ab") as errors:
            return subprocess.Popen(command, env=environment, stderr=errors, start_new_session=True)

    def end(process: subprocess.Popen[bytes], code: int) -> None:
        try:
            process.wait(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.returncode == code, (top / "errors").read_text()

    for devices, cases in CASES.items():
        for process in [start("kill", devices, case) for case in cases]:
            end(process, -signal.SIGKILL)
        # One process for both saves imports; the resumed runs come first, in a fresh one.
        end(start("resume+whole", devices, *cases), 0)
    return {n: {m: top / str(n) / m for m in ("whole", "killed")} for n in CASES}


class TestKilledAndResumed:
    @pytest.mark.parametrize(
        ("devices", "case"), [(devices, case) for devices in CASES for case in CASES[devices]]
    )
    def test_ends_with_the_weights_of_an_uninterrupted_run(
        self, folders: dict[int, dict[str, Path]], devices: int, case: str
    ) -> None:
        place = case.replace(",", "-")
        whole, _ = torch.load(folders[devices]["whole"] / place / "whole.pt", weights_only=True)
        resumed, _ = torch.load(folders[devices]["killed"] / place / "resume.pt", weights_only=True)
        assert whole.keys() == resumed.keys()
        differ = [name for name, tensor in whole.items() if not torch.equal(resumed[name], tensor)]
        assert not differ

    def test_scores_of_heads_count_each_image_once(
        self, folders: dict[int, dict[str, Path]]
    ) -> None:
        """Nine images for two processes: the sampler repeats one."""
        _, scores = torch.load(folders[2]["whole"] / "C2BIN-1-1" / "whole.pt", weights_only=True)
        # Of nine images, shares are ninths: of ten, with one counted twice, they would be tenths.
        for head in ("0_of_3", "1_of_5"):
            for score in ("agreement", "purity", "acc"):
                ninths = 9 * scores[f"val_{score}_{head}"]
                assert ninths == pytest.approx(round(ninths), abs=1e-5), (score, head)


CHECKOUT = os.environ.get("LIGHTLY_CHECKOUT")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for label in range(CLASSES):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(2):
                color = (40 * label, 100 * i, 90)
                Image.new("RGB", (32, 32), color).save(folder / split / str(label) / f"{i}.png")
    return folder


@pytest.mark.skipif(not CHECKOUT, reason="LIGHTLY_CHECKOUT names no checkout of lightly")
class TestScript:
    """lightly's own script: minutes of ResNet-50 at 224 pixels on a CPU."""

    def test_backbones_of_lightlys_own_methods_load(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchvision.models import resnet50

        monkeypatch.syspath_prepend(f"{CHECKOUT}/benchmarks/imagenet/resnet50")
        for name, kind in (("byol", "BYOL"), ("mocov2", "MoCoV2")):
            method = getattr(importlib.import_module(name), kind)(8, CLASSES)
            fitted = trainer()
            fitted.strategy.connect(method)
            fitted.save_checkpoint(tmp_path / f"{name}.ckpt")
            net = resnet50()
            net.fc = nn.Identity()
            load_backbone(tmp_path / f"{name}.ckpt", net)
            for key, tensor in method.backbone.state_dict().items():
                assert torch.equal(net.state_dict()[key], tensor), (name, key)

    @pytest.mark.parametrize("devices", [1, 2])
    def test_pretrains_and_evaluates_c2bin(
        self, images: Path, tmp_path: Path, devices: int
    ) -> None:
        command = [sys.executable, "-m", "c2bin_lightly", "--num-clusters", "3,5"]
        command += [f"{CHECKOUT}/benchmarks/imagenet/resnet50/main.py", "--methods", "c2bin"]
        command += ["--train-dir", str(images / "train"), "--val-dir", str(images / "val")]
        command += ["--log-dir", str(tmp_path), "--num-classes", str(CLASSES), "--knn-k", "3"]
        command += ["--epochs", "1", "--batch-size-per-device", "4", "--num-workers", "1"]
        command += ["--accelerator", "cpu", "--devices", str(devices), "--precision", "32"]
        command += ["--strategy", "ddp" if devices > 1 else "auto", "--seed", "0"]
        command += ["--skip-linear-eval", "--skip-finetune-eval"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Results for c2bin:" in done.stdout
        assert "val_knn_top1" in done.stdout
        (checkpoint,) = tmp_path.glob("**/*.ckpt")
        from torchvision.models import resnet50

        net = resnet50()
        net.fc = nn.Identity()
        load_backbone(checkpoint, net)
