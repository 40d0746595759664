"""C2BIN and its baselines in the two forms that lightly's benchmarks ask of a method.

Its ImageNet scripts (`benchmarks/imagenet/*/main.py` of its git repository)
build a method from `(batch_size_per_device, num_classes)`: `C2BINResNet50`, `transform` and
`register`. Its CIFAR-10 benchmark derives from `lightly.utils.benchmarking.BenchmarkModule`, which
is in the pip package: `SimCLRBenchmark`, `MoCoV2Benchmark`, `BYOLBenchmark`, `C2BINBenchmark`.
"""

from __future__ import annotations

import copyreg
from collections.abc import MutableMapping, Sequence
from typing import Any, Literal

from lightly.transforms.byol_transform import BYOLTransform
from lightly.utils.benchmarking import BenchmarkModule, KNNClassifier, OnlineLinearClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet50

from c2bin_ext import C2BINLoss
from c2bin_ext._hosts import check_scorable, labelled, two_views
from c2bin_lightly.training import BYOL, C2BIN, MoCoV2, SimCLR, Trained, trained_by_decay

__all__ = [
    "BYOLBenchmark",
    "C2BINBenchmark",
    "C2BINResNet50",
    "MoCoV2Benchmark",
    "SimCLRBenchmark",
    "register",
    "transform",
]

# The views of lightly's BYOL benchmark. The paper (section 4.2) has those of SimCLR, without the
# asymmetric blur and the solarisation; the row beside BYOL should differ from it by the clusters
# alone.
transform = BYOLTransform()

# What C2BINLoss takes of the paper's Table 7. The other options stay at the library's defaults
# instead of the printed ones, which collapse: docs/explanation/defaults.md.
TABLE_7: dict[str, Any] = {"cluster_weight": 1.0, "entropy_weight": 0.05, "temperature": 0.2}


class _OnlineKNN(KNNClassifier):  # type: ignore[misc]
    """lightly's kNN as part of a method, which logs the scores that it returns."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing: Lightning refuses what a module inside of a module logs."""


class C2BINResNet50(C2BIN):
    """C2BIN on ResNet-50 as lightly's ImageNet benchmark trains and evaluates it.

    All but the clusters and their weights, which are those of the paper's Table 7, is that of the
    benchmark's BYOL. Beside what `C2BIN` logs it logs the metrics of lightly's online linear
    classifier and, when asked for, of its online kNN.

    Args:
        batch_size_per_device: Images of a batch on one device; the learning rate is
            0.45 × global batch / 256.
        num_classes: Classes of the online classifiers.
        knn_k: Neighbours of the online kNN; None, for no online kNN, expects one validation loader
            instead of [bank, validation].
        knn_t: Temperature of the online kNN.
        num_clusters: K of each head.
        loss: The objective, if not that of Table 7. It is not stored in checkpoints.
        normalize, against: As in `C2BIN`; by default as in the paper.

    Raises:
        ValueError: One of knn_k and knn_t without the other.

    Examples:
        >>> model = C2BINResNet50(batch_size_per_device=64, num_classes=10, num_clusters=(8, 16))
        >>> model.online_classifier.feature_dim
        2048

    Source: C2BIN, Table 7; lightly, `benchmarks/imagenet/resnet50/byol.py`.
    """

    def __init__(
        self,
        batch_size_per_device: int,
        num_classes: int,
        knn_k: int | None = None,
        knn_t: float | None = None,
        *,
        # Table 7. At its batch of 256 the largest head has more clusters than the batch has images.
        num_clusters: Sequence[int] = (512, 1024, 2048),
        normalize: bool = False,
        loss: C2BINLoss | None = None,
        against: Literal["runner", "follower"] = "runner",
    ) -> None:
        if (knn_k is None) != (knn_t is None):
            raise ValueError(
                f"knn_k and knn_t: expected both or neither, got knn_k={knn_k}, knn_t={knn_t}"
            )
        backbone = resnet50()
        backbone.fc = nn.Identity()
        super().__init__(
            backbone,
            2048,
            num_clusters=num_clusters,
            normalize=normalize,
            loss=C2BINLoss(**TABLE_7, gather_distributed=True) if loss is None else loss,
            against=against,
            hidden_dim=4096,  # Table 7 and lightly's BYOL alike
            projection_dim=256,  # lightly's BYOL; Table 7 does not say
            # 0.99 in both; the cosine to 1 is lightly's, Table 7 has it constant.
            follower_momentum=0.99,
            follower_schedule="cosine",
            # lightly's BYOL. Table 7 has SGD, learning rate 0.03, a tenth of it from epoch 120 and
            # again from 160 of 200: steps that fit no other number of epochs, and another optimiser
            # than the BYOL of the row above. Weight decay and momentum are the same in both.
            optimizer="lars",
            lr=0.45,
            weight_decay=1e-6,
            momentum=0.9,
            schedule="cosine",
            warmup_epochs=10,
        )
        self.batch_size_per_device = batch_size_per_device
        self.online_classifier = OnlineLinearClassifier(feature_dim=2048, num_classes=num_classes)
        self.knn_classifier: _OnlineKNN | None = None
        if knn_k is not None:
            loaders = {"train_dataloader_idx": 0, "val_dataloader_idx": 1}
            self.knn_classifier = _OnlineKNN(None, num_classes, knn_k, knn_t, **loaders)

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Take `((view0, view1), labels, ...)`; labels reach only the online classifier."""
        view0, view1 = two_views(batch, labelled=True)
        labels, branches = batch[1], self.method.branches(view0, view1)
        losses = self.method.objective(branches)
        online_loss, online = self.online_classifier.training_step(
            (branches.features[0].detach(), labels), batch_idx
        )
        self.log_losses(losses, len(labels))
        self.log_dict(online, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        total: Tensor = losses["loss"] + online_loss
        return total

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the features of `(images, labels, ...)`, of the kNN's bank (loader 0) or not."""
        images, labels = labelled(batch)
        features: Tensor = self(images)
        scores: dict[str, Tensor] = {}
        if self.knn_classifier is not None:
            found = self.knn_classifier.validation_step(
                (features, labels), batch_idx, dataloader_idx
            )
            if dataloader_idx == 0:
                return features
            scores.update(found)
        scores.update(self.online_classifier.validation_step((features, labels), batch_idx)[1])
        shown: dict[str, Any] = {"prog_bar": True, "sync_dist": True, "add_dataloader_idx": False}
        self.log_dict(scores, batch_size=len(labels), **shown)
        return features

    def on_validation_epoch_end(self) -> None:
        """Let go of the kNN's bank."""
        if self.knn_classifier is not None:
            self.knn_classifier.reset_storage()

    def learning_rate(self) -> float:
        """Return the learning rate of the global batch: linear in its size, as lightly's BYOL."""
        return super().learning_rate() * self.batch_size_per_device * self.trainer.world_size / 256

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return C2BIN's groups, and the online classifier's, which has no weight decay."""
        decayed, undecayed = trained_by_decay([self.method])
        online = {"name": "online_classifier", "params": [*self.online_classifier.parameters()]}
        return [
            {"name": "c2bin", "params": decayed},
            {"name": "c2bin_no_weight_decay", "params": undecayed, "weight_decay": 0.0},
            {**online, "weight_decay": 0.0},
        ]


def register(
    methods: MutableMapping[str, dict[str, Any]], *, online_knn: bool = True, **options: Any
) -> None:
    """Add C2BIN under the name `"c2bin"` to the methods of one of lightly's ImageNet scripts.

    Args:
        methods: The script's `METHODS`; changed in place.
        online_knn: Take the `knn_k` and `knn_t` that the script offers, and have its kNN after
            every epoch. That costs a pass over the training images; lightly's SimCLR pays it too,
            its BYOL and MoCo v2 do not.
        **options: Of `C2BINResNet50`: `num_clusters`, `normalize`, `loss`, `against`.

    Raises:
        TypeError: An unknown option.
        ValueError: `methods` has a `"c2bin"` already.

    Examples:
        >>> METHODS = {}
        >>> register(METHODS, num_clusters=(32, 64, 128))
        >>> sorted(METHODS["c2bin"])
        ['model', 'transform']
    """
    known = ["against", "loss", "normalize", "num_clusters"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"register got unknown options {unknown}; known: {known}")
    if "c2bin" in methods:
        raise ValueError("methods: expected no entry 'c2bin', got one: it is registered already")
    methods["c2bin"] = {"model": _registered(online_knn, options), "transform": transform}


class _Registered(type(C2BINResNet50)):  # type: ignore[misc]
    """The type of what `register` makes: a class that processes can send each other."""

    made_by: tuple[bool, dict[str, Any]]


copyreg.pickle(_Registered, lambda kind: (_registered, kind.made_by))


def _registered(online_knn: bool, options: dict[str, Any]) -> _Registered:
    # The scripts look at the signature to see whether a method has an online kNN.
    # Those that have none, vitb16's and older ones, give no arguments for it.
    class WithoutKNN(C2BINResNet50, metaclass=_Registered):
        made_by = online_knn, options

        def __init__(self, batch_size_per_device: int, num_classes: int, **knn: Any) -> None:
            super().__init__(batch_size_per_device, num_classes, **knn, **options)

    class WithKNN(WithoutKNN):
        def __init__(
            self, batch_size_per_device: int, num_classes: int, knn_k: Any = None, knn_t: Any = None
        ) -> None:
            super().__init__(batch_size_per_device, num_classes, knn_k=knn_k, knn_t=knn_t)

    return WithKNN if online_knn else WithoutKNN


class _Benchmark(Trained, BenchmarkModule):  # type: ignore[misc]
    """A method as a BenchmarkModule: ours trains it, lightly's validates it."""

    form: type[Trained]  # which names the method's arguments
    max_accuracy: float

    def __init__(
        self,
        dataloader_kNN: DataLoader[Any],  # noqa: N803 - lightly's name
        num_classes: int,
        knn_k: int = 200,
        knn_t: float = 0.1,
        **method: Any,
    ) -> None:
        super().__init__(dataloader_kNN, num_classes, knn_k, knn_t)
        del self.backbone  # lightly's placeholder
        built = self.form(**method)
        self.wrap(built.method, built.optimization)

    def on_validation_epoch_start(self) -> None:
        """Fill the kNN's bank, which needs a class for each image."""
        super().on_validation_epoch_start()
        check_scorable("dataloader_kNN", self._train_features, self._train_targets)

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Take `(images, labels, names)`; each image needs a class."""
        images, labels = labelled(batch)
        check_scorable("validation images", images, labels)
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy; that of the sanity check's few images is not the best so far."""
        best = self.max_accuracy
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking:
            self.max_accuracy = best

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the best accuracy so far, which lightly would start anew in a resumed run."""
        checkpoint["max_accuracy"] = self.max_accuracy

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the best accuracy so far."""
        self.max_accuracy = checkpoint["max_accuracy"]


class SimCLRBenchmark(_Benchmark):
    """SimCLR as a BenchmarkModule: lightly's kNN accuracy after every epoch, its best kept.

    As lightly has it, `max_accuracy` is a share in [0, 1] and the logged `kNN_accuracy` is in
    percent.

    Args:
        dataloader_kNN: Batches `(images, labels, names)` of the training images without
            augmentation, the kNN's bank.
        num_classes: Classes of the kNN.
        knn_k: Neighbours, at most as many as the bank has images.
        knn_t: Temperature of the kNN.
        **method: Of `SimCLR`; `backbone` and `feature_dim` are required.

    Examples:
        >>> from torch import nn
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
        >>> bank = DataLoader([])
        >>> SimCLRBenchmark(bank, 10, knn_k=20, backbone=backbone, feature_dim=8).max_accuracy
        0.0
    """

    form = SimCLR


class MoCoV2Benchmark(_Benchmark):
    """MoCo v2 as a BenchmarkModule: see `SimCLRBenchmark` and `MoCoV2` for the arguments."""

    form = MoCoV2


class BYOLBenchmark(_Benchmark):
    """BYOL as a BenchmarkModule: see `SimCLRBenchmark` and `BYOL` for the arguments."""

    form = BYOL


class C2BINBenchmark(_Benchmark):
    """C2BIN as a BenchmarkModule: see `SimCLRBenchmark` and `C2BIN` for the arguments.

    Beside `kNN_accuracy` it logs the scores of each head, see `C2BIN`.
    """

    form = C2BIN
