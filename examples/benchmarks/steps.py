"""Training steps of c2bin_lightly, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor], Tensor]


def lightly_steps(device: torch.device) -> dict[str, Step]:
    """BYOL and C2BIN of c2bin_lightly, with lightly's heads and its momentum update."""
    from c2bin_lightly import BYOL, C2BIN
    from lightly.models.utils import update_momentum
    from torchvision.models import resnet18

    def step_of(method: Callable[..., Any]) -> Step:
        torch.manual_seed(0)
        backbone = resnet18()
        backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
        backbone.fc = nn.Identity()
        model = method(backbone, 512, hidden_dim=512, projection_dim=512).to(device)
        model.log_dict = lambda *args, **kwargs: None  # there is no trainer to log to
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.06, momentum=0.9
        )

        def step(view0: Tensor, view1: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model.training_step(((view0, view1), None), 0)
            loss.backward()
            optimizer.step()
            update_momentum(model.backbone, model.follower_backbone, m=0.99)
            update_momentum(model.projector, model.follower_projector, m=0.99)
            return loss

        return step

    return {"BYOL": step_of(BYOL), "C2BIN": step_of(C2BIN)}
