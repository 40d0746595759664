"""The paper's hyperparameter tables, typed in from the paper and from nothing else.

Keys are paths of solo-learn's configs. What no table says has no entry.
"""

from __future__ import annotations

from typing import Any

_Settings = dict[str, Any]


def _mlp(hidden: int, out: int) -> _Settings:
    return {
        "method_kwargs.proj_hidden_dim": hidden,
        "method_kwargs.proj_output_dim": out,
        "method_kwargs.pred_hidden_dim": hidden,
    }


def _momentum_factor(gamma: float) -> _Settings:
    return {"momentum.base_tau": gamma, "momentum.final_tau": gamma}


TABLE_5: _Settings = {
    "max_epochs": 300,
    "optimizer.name": "lars",
    "optimizer.lr": 0.2,
    "scheduler.name": "none",
    "optimizer.weight_decay": 1e-6,
    "optimizer.kwargs.momentum": 0.9,
    "optimizer.batch_size": 256,
    "method_kwargs.cluster_weight": 2.0,
    "method_kwargs.entropy_weight": 1.0,
    "backbone.name": "resnet18",
    **_mlp(512, 512),
    **_momentum_factor(0.990),
    "method_kwargs.temperature": 0.5,
    "method_kwargs.against": "runner",
    "method_kwargs.normalize": False,
    "method_kwargs.num_clusters": [32, 64, 128],
}

TABLE_6: _Settings = {
    "max_epochs": 300,
    "optimizer.name": "lars",
    "scheduler.name": "none",
    "optimizer.weight_decay": 1e-6,
    "optimizer.kwargs.momentum": 0.9,
    "optimizer.batch_size": 256,
}
TABLE_6_RATES = (0.1, 0.2, 0.3, 0.4, 0.5)

TABLE_7: _Settings = {
    "max_epochs": 200,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.03,
    "scheduler.name": "step",
    "scheduler.lr_decay_steps": [120, 160],
    "optimizer.weight_decay": 1e-6,
    "optimizer.kwargs.momentum": 0.9,
    "optimizer.batch_size": 256,
    "method_kwargs.cluster_weight": 1.0,
    "method_kwargs.entropy_weight": 0.05,
    "backbone.name": "resnet50",
    **_mlp(2048, 4096),
    **_momentum_factor(0.990),
    "method_kwargs.temperature": 0.2,
    "method_kwargs.against": "runner",
    "method_kwargs.normalize": False,
    "method_kwargs.num_clusters": [512, 1024, 2048],
}

TABLE_8: _Settings = {
    "max_epochs": 200,
    "optimizer.name": "sgd",
    "optimizer.lr": 30.0,
    "scheduler.name": "step",
    "scheduler.lr_decay_steps": [60, 80],
    "optimizer.weight_decay": 1e-6,
    "optimizer.kwargs.momentum": 0.9,
    "optimizer.batch_size": 256,
}

TABLE_10: _Settings = {
    "max_epochs": 100,
    "optimizer.name": "adam",
    "optimizer.lr": 3e-4,
    "scheduler.name": "warmup_cosine",
    "scheduler.warmup_epochs": 0,
    "scheduler.min_lr": 0.0,
    "optimizer.weight_decay": 0,
    "optimizer.batch_size": 256,
    "method_kwargs.cluster_weight": 1.0,
    "method_kwargs.entropy_weight": 1.0,
    "backbone.name": "resnet34",
    **_mlp(512, 512),
    **_momentum_factor(0.995),
    "method_kwargs.temperature": 1.0,
    "method_kwargs.against": "runner",
    "method_kwargs.normalize": False,
}

PRETRAINING: dict[str, _Settings] = {
    **{f"c2bin-{data}": TABLE_5 for data in ("cifar10", "cifar100", "stl10")},
    # Not experiments of the paper: its ResNet-18 setup.
    **{f"c2bin-{data}": TABLE_5 for data in ("imagenet100", "custom")},
    "c2bin-imagenet": TABLE_7,
    **{
        f"c2bin-clustering-{data}": TABLE_10 | {"method_kwargs.num_clusters": [first, 40, 160]}
        for data, first in (("cifar10", 10), ("cifar100", 20), ("stl10", 10))
    },
}
LINEAR: dict[str, _Settings] = {
    **{
        f"c2bin-linear-{data}": TABLE_6
        for data in ("cifar10", "cifar100", "stl10", "imagenet100", "custom")
    },
    "c2bin-linear-imagenet": TABLE_8,
}
