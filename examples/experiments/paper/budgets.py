"""What a budget means: images, epochs, backbones and which rows of the larger tables are run."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.paper.published import TABLE4, TABLE9


@dataclass(frozen=True)
class Budget:
    """Everything about a run that is a matter of scale.

    What begins with `clustering_` is for Table 3 and Figures 5 to 11, the rest for Tables 1, 4, 9,
    Figure 4 and the oracle.
    """

    name: str
    dataset: str  # by default
    seeds: tuple[int, ...]  # by default
    epochs: int
    clustering_epochs: int
    snapshots: tuple[int, ...]  # epochs of Figure 5
    batch_size: int
    clustering_batch_size: int
    rates: tuple[float, ...]  # of Figure 4
    heads: tuple[tuple[int, ...], ...]  # of Tables 4 and 9
    limit: int | None = None  # training images, at most
    limit_test: int | None = None
    backbone: str = "small"
    clustering_backbone: str = "small"
    papers_optimizer: bool = False  # LARS of Table 5; if not, the demo's SGD, cosine schedule
    probe_epochs: int = 300  # of the linear evaluation
    stored_views: bool = True  # make the views of a seed once, for all methods


BUDGETS = {
    "smoke": Budget(
        name="smoke",
        dataset="digits",
        seeds=(0,),
        limit=320,
        limit_test=100,
        epochs=1,
        clustering_epochs=3,
        snapshots=(1, 2, 3),
        batch_size=160,
        clustering_batch_size=160,
        probe_epochs=30,
        rates=(1.0, 2.0),
        heads=((), (32,), (32, 64, 128)),
    ),
    # At so few images BYOL and C2BIN need steps more than they need large batches, even though the
    # largest heads then have more clusters than a batch has images.
    "small": Budget(
        name="small",
        dataset="cifar10",
        seeds=(0, 1),
        limit=2000,
        limit_test=1000,
        epochs=12,
        clustering_epochs=12,
        snapshots=(1, 4, 12),
        batch_size=64,
        clustering_batch_size=80,
        rates=(1.0, 10.0, 100.0),
        heads=tuple(TABLE4),
    ),
    "full": Budget(
        name="full",
        dataset="cifar10",
        seeds=(0, 1, 2, 3, 4),
        backbone="resnet18",
        clustering_backbone="resnet34",
        epochs=300,
        clustering_epochs=100,
        snapshots=(5, 30, 100),
        batch_size=256,
        clustering_batch_size=256,
        papers_optimizer=True,
        stored_views=False,
        rates=(1.0, 10.0, 20.0, 50.0, 100.0),
        heads=(*TABLE4, *TABLE9),
    ),
}
