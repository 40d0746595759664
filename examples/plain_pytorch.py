"""C2BIN on your own backbone, no framework; pip install "c2bin-ext[eval]" for data and scores."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import affine_grid, grid_sample
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from c2bin_ext import C2BINObjective
from c2bin_ext.metrics import clustering_accuracy, knn_accuracy


def augment(images: torch.Tensor) -> torch.Tensor:
    maps = torch.eye(2, 3) + 0.15 * torch.randn(len(images), 2, 3)  # rotate, scale, shift
    grid = affine_grid(maps, list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def mlp(d_in: int, d_out: int) -> nn.Sequential:
    hidden = nn.Linear(d_in, 96), nn.BatchNorm1d(96), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(96, d_out))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=600)
steps = parser.parse_args().steps
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train, test = torch.randperm(len(images)).split([1437, 360])

backbone = nn.Sequential(nn.Conv2d(1, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten())
projector, predictor = mlp(1024, 64), mlp(64, 64)
objective = C2BINObjective(in_features=1024, num_clusters=(10, 20, 40))  # cluster heads and loss
runner = nn.Sequential(backbone, projector)  # the online network
average = AveragedModel(runner, multi_avg_fn=get_ema_multi_avg_fn(0.99))
average.requires_grad_(False)
follower_backbone, follower_projector = average.module.children()  # the EMA target network
trained = nn.ModuleList([runner, predictor, objective])  # the heads too
optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)

for step in range(1, steps + 1):
    batch = images[train[torch.randint(len(train), (256,))]]
    views = augment(batch), augment(batch)
    features = [backbone(view) for view in views]
    predictions = [predictor(projector(feature)) for feature in features]
    followed = [follower_backbone(view) for view in views]
    targets = [follower_projector(feature) for feature in followed]
    output = objective(predictions, targets, features, target_features=followed)
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    average.update_parameters(runner)
    if step % 100 == 0 or step == steps:
        print(step, *(f"{name} {value:.3f}" for name, value in output._asdict().items()))

with torch.no_grad():
    features = backbone.eval()(images)
    clusters = objective.head(features[test])[0].argmax(dim=1)
print("kNN(5):", knn_accuracy(features[train], labels[train], features[test], labels[test], 5, 0.1))
print("ACC of the 10-cluster head:", clustering_accuracy(labels[test], clusters))
