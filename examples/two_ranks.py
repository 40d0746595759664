"""Two processes give the loss and the gradient of one process on the whole batch.

    torchrun --nproc_per_node 2 examples/two_ranks.py

Needs `pip install c2bin-ext`. Each process has its part of a batch, of different sizes; what
`gather_distributed=True` adds is one collective per step, of sums over instances.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from c2bin_ext import C2BINObjective


class Model(nn.Module):
    def __init__(self, gather: bool) -> None:
        super().__init__()
        self.net = nn.Linear(12, 16)
        self.objective = C2BINObjective(16, num_clusters=(4, 8), gather_distributed=gather)

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        features = (self.net(view0), self.net(view1))
        loss: Tensor = self.objective(features, features, features).loss
        return loss


def step(model: nn.Module, views: Tensor) -> tuple[float, Tensor]:
    loss = model(*views)
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat([grad.flatten() for grad in grads])


dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same weights and images everywhere
views = torch.randn(2, 24 * ranks + ranks * (ranks - 1) // 2, 12)
parts = views.split([24 + r for r in range(ranks)], dim=1)
results = {}
for gather in (True, False):
    torch.manual_seed(1)
    results[gather] = step(DistributedDataParallel(Model(gather)), parts[rank])
torch.manual_seed(1)
loss, gradient = step(Model(False), views)
if rank == 0:
    print(f"one process on the whole batch: loss {loss:.6f}, gradient norm {gradient.norm():.6f}")
    for gather, (own, found) in results.items():
        off = ((found - gradient).norm() / gradient.norm()).item()
        print(
            f"{ranks} processes, gather_distributed={gather}: loss {own:.6f} on the first, "
            f"gradient off by {off:.1e} of its norm"
        )
dist.destroy_process_group()
