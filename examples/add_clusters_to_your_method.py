"""Add the cluster loss to a method of your own, here SimCLR, in the three lines marked `# added`.

Needs `pip install "c2bin-ext[eval,lightly]"`. Trains SimCLR on scikit-learn's digits without and
with the cluster loss, from the same weights, and prints what the features and the clusters are
worth.
"""

import argparse

import torch
from lightly.loss import NTXentLoss
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from c2bin_ext import MultiScaleClusterHead, MultiScaleClusterLoss
from c2bin_ext.metrics import knn_accuracy, normalized_mutual_information


def augment(images: Tensor) -> Tensor:
    maps = torch.eye(2, 3) + 0.15 * torch.randn(len(images), 2, 3)  # rotate, scale, shift
    return grid_sample(images, affine_grid(maps, list(images.shape), False), align_corners=False)


def train(steps: int, cluster_weight: float) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten())
    projector = nn.Sequential(nn.Linear(1024, 96), nn.ReLU(), nn.Linear(96, 64))
    simclr = NTXentLoss(temperature=0.5)
    model = nn.ModuleList([conv, projector])
    model.append(heads := MultiScaleClusterHead(1024, (10, 20), normalize=True))  # added
    clusters = MultiScaleClusterLoss()  # added
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = images[bank[torch.randint(len(bank), (256,))]]
        features = [conv(augment(batch)) for _ in range(2)]
        loss = simclr(*(projector(feature) for feature in features))
        loss = loss + cluster_weight * clusters([heads(f) for f in features]).loss  # added
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = conv.eval()(images)
        nmi = normalized_mutual_information(labels[test], heads(found[test])[0].argmax(dim=1))
    knn = knn_accuracy(found[bank], labels[bank], found[test], labels[test], 5, 0.1)
    print(f"cluster weight {cluster_weight}: kNN(5) {knn:.3f}, NMI of the 10 clusters {nmi:.3f}")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
arguments = parser.parse_args()
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
torch.manual_seed(0)
bank, test = torch.randperm(len(images)).split([1437, 360])
for weight in (0.0, 0.5):
    train(arguments.steps, weight)
