"""What a GPU needs: no value is read, which would wait for it, and no tensor is made elsewhere.

Tensors on the device `meta` have no values, so whatever reads one raises; and they do not mix with
tensors of another device. On a machine with a GPU the same steps are also captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from c2bin_ext import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    ClusterEntropyRegularizer,
    MultiScaleClusterHead,
)

CLUSTERS = (4, 6)
FOLLOWER = "follower, features of one length"
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"
)


OBJECTIVES: list[tuple[str, Callable[[], nn.Module]]] = [
    ("cosine", C2BINLoss),
    ("small temperature", lambda: C2BINLoss(temperature=0.02)),
    ("printed", C2BINLoss.paper),
    ("weightless", lambda: C2BINLoss(cluster_weight=0.0)),
    ("running", lambda: C2BINLoss(running_decay=0.9, num_clusters=CLUSTERS)),
    ("gathered", lambda: C2BINLoss(gather_distributed=True)),
    (FOLLOWER, C2BINLoss.recommended),
]


class Model(nn.Module):
    """A network with the whole objective on top, as one of `OBJECTIVES` wants it."""

    def __init__(self, loss: nn.Module, name: str = "") -> None:
        super().__init__()
        self.follower = name == FOLLOWER
        self.encoder = nn.Linear(5, 8)
        self.predictor = nn.Linear(8, 8)
        self.head = MultiScaleClusterHead(8, CLUSTERS, normalize=self.follower)
        self.loss = loss

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        features = self.encoder(view0), self.encoder(view1)
        predictions = tuple(map(self.predictor, features))
        heads = tuple(map(self.head, features))
        fixed = None
        if self.follower:
            with torch.no_grad():
                fixed = tuple(self.head(f + 1) for f in features)
        loss: Tensor = self.loss(predictions, features, heads, target_assignments=fixed).loss
        return loss


@pytest.mark.parametrize(("name", "build"), OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_step_reads_no_value(
    name: str, build: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model = Model(build(), name).to("meta", dtype)
    views = torch.empty(2, 7, 5, device="meta", dtype=dtype)
    loss = model(*views)
    loss.backward()
    assert loss.device.type == "meta"
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize(
    "criterion",
    [
        BCAContrastiveLoss(),
        BCAContrastiveLoss(similarity="dot", positive_in_denominator=False, symmetric=False),
        BCAContrastiveLoss(running_decay=0.5, num_clusters=6),
        BootstrapAlignmentLoss(),
        ClusterEntropyRegularizer(),
        ClusterEntropyRegularizer(reduction="sum"),
        ClusterEntropyRegularizer(running_decay=0.5, num_clusters=6),
    ],
    ids=repr,
)
def test_a_loss_reads_no_value(criterion: nn.Module) -> None:
    rows = torch.empty(7, 6, device="meta", requires_grad=True)
    one = isinstance(criterion, ClusterEntropyRegularizer)
    loss = criterion.to("meta")(*[rows] if one else [rows, rows * 2])
    loss.backward()
    assert loss.device.type == rows.grad.device.type == "meta"


def test_reading_a_value_would_be_seen() -> None:
    checked = C2BINLoss(validate_args=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        Model(checked).to("meta")(*torch.empty(2, 7, 5, device="meta"))


def test_statistics_read_no_value() -> None:
    model = Model(C2BINLoss()).to("meta")
    views = torch.empty(2, 7, 5, device="meta")
    features = tuple(map(model.encoder, views))
    heads = tuple(map(model.head, features))
    total = model.loss.statistics(features, features, heads)
    assert total.device.type == "meta"
    loss = model.loss(features, features, heads, statistics=total).loss
    assert loss.device.type == "meta"


@needs_gpu
@pytest.mark.parametrize(("name", "build"), OBJECTIVES)
def test_a_step_is_captured_as_a_cuda_graph(name: str, build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Model(build(), name).cuda()
    views = torch.randn(2, 64, 5, device="cuda")
    fresh = torch.randn(2, 64, 5, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad()
            model(*views).backward()
    torch.cuda.current_stream().wait_stream(stream)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(*views)
        loss.backward()
    model.load_state_dict(state)
    views.copy_(fresh)
    graph.replay()
    captured = loss.clone(), [p.grad.clone() for p in model.parameters()]

    model.load_state_dict(state)
    model.zero_grad()
    eager = model(*fresh)
    eager.backward()
    torch.testing.assert_close(captured[0], eager.detach())
    torch.testing.assert_close(captured[1], [p.grad for p in model.parameters()])


@needs_gpu
@pytest.mark.parametrize(("name", "build"), OBJECTIVES)
def test_a_step_never_waits_for_the_gpu(name: str, build: Callable[[], nn.Module]) -> None:
    model = Model(build(), name).cuda()
    views = torch.randn(2, 64, 5, device="cuda")
    model(*views).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(*views).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
