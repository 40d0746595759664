"""A batch that does not fit in memory, in parts: the loss and the gradient of the whole batch.

Needs `pip install c2bin-ext`. A first pass without gradient adds up the sums over instances, a
second one gives each part its share of the gradient; averaging the losses of the parts, as one
does with losses that are means over images, gives another gradient.
"""

import torch
from torch import Tensor, nn

from c2bin_ext import C2BINObjective

Three = tuple[tuple[Tensor, Tensor], ...]

torch.manual_seed(0)
net, objective = nn.Linear(12, 16), C2BINObjective(16, num_clusters=(4, 8))
parameters = [*net.parameters(), *objective.parameters()]
views = torch.randn(2, 96, 12)


def outputs(part: Tensor) -> Three:
    features = (net(part[0]), net(part[1]))
    return features, features, features  # predictions, targets, features


def gradient() -> Tensor:
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return found


loss = objective(*outputs(views)).loss
loss.backward()
whole = gradient()
print(f"the whole batch of {views.shape[1]}: loss {loss:.6f}, gradient norm {whole.norm():.6f}")

parts = views.split(24, dim=1)
with torch.no_grad():
    total = torch.stack([objective.statistics(*outputs(part)) for part in parts]).sum(dim=0)
for part in parts:
    loss = objective(*outputs(part), statistics=total).loss
    loss.backward()
off = ((gradient() - whole).norm() / whole.norm()).item()
print(f"{len(parts)} parts, sums shared: loss {loss:.6f}, gradient off by {off:.1e} of its norm")

for part in parts:
    loss = objective(*outputs(part)).loss / len(parts)
    loss.backward()
off = ((gradient() - whole).norm() / whole.norm()).item()
print(f"{len(parts)} parts, losses averaged: gradient off by {off:.1e} of its norm")
