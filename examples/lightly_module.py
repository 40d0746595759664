"""A LightningModule of your own: lightly's heads and momentum update, and C2BINObjective.

Needs `pip install "c2bin-ext[eval,lightly]"`. Trains on scikit-learn's digits and prints the loss
of every epoch and the scores of the clusters on images that were not trained on.
"""

import argparse
import copy
import logging
import warnings
from typing import Any

import torch
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from pytorch_lightning import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import DataLoader, TensorDataset

from c2bin_ext import C2BINObjective
from c2bin_ext.monitoring import ClusterMonitor

CLUSTERS = (10, 20, 40)


def augment(images: Tensor) -> Tensor:
    maps = torch.eye(2, 3) + 0.15 * torch.randn(len(images), 2, 3)  # rotate, scale, shift
    return grid_sample(images, affine_grid(maps, list(images.shape), False), align_corners=False)


class MyMethod(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        conv = nn.Sequential(nn.Conv2d(1, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten())
        self.backbone, self.projector = conv, BYOLProjectionHead(1024, 128, 64)
        self.predictor = BYOLPredictionHead(64, 128, 64)
        self.follower = copy.deepcopy(nn.ModuleList([self.backbone, self.projector]))
        deactivate_requires_grad(self.follower)  # the EMA target network
        self.objective = C2BINObjective(in_features=1024, num_clusters=CLUSTERS)
        self.monitor = ClusterMonitor(CLUSTERS, prefix="")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = [augment(batch[0]) for _ in range(2)]
        features = [self.backbone(view) for view in views]
        predictions = [self.predictor(self.projector(feature)) for feature in features]
        followed = [self.follower[0](view) for view in views]
        targets = [self.follower[1](feature) for feature in followed]
        output = self.objective(predictions, targets, features, target_features=followed)
        parts = {name: value.detach() for name, value in output._asdict().items()}
        self.log_dict(parts, on_step=False, on_epoch=True)
        loss: Tensor = output.loss
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        update_momentum(nn.ModuleList([self.backbone, self.projector]), self.follower, m=0.99)

    def on_train_epoch_end(self) -> None:
        parts = self.trainer.callback_metrics.items()
        print(f"epoch {self.current_epoch}:", *(f"{name} {value:.3f}" for name, value in parts))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.monitor.update(self.objective.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3)


logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning")
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=10)
epochs = parser.parse_args().epochs
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
data = TensorDataset(images, torch.tensor(digits.target))
train, test = torch.utils.data.random_split(data, [1437, 360])
trainer = Trainer(
    accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
model = MyMethod()
trainer.fit(model, DataLoader(train, 128, shuffle=True, drop_last=True))
trainer.validate(model, DataLoader(test, 360), verbose=False)
for name, score in model.monitor.compute().items():
    if name.endswith("_0_of_10"):
        print(f"{name.removesuffix('_0_of_10')} of the 10 clusters: {score:.3f}")
