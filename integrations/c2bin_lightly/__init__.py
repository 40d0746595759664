"""C2BIN for lightly: its baselines and C2BIN as LightningModules over any backbone.

lightly's pip package has the building blocks (heads, losses, momentum update, LARS, schedules) and
leaves the methods to its benchmark scripts. This package puts the blocks together: `SimCLR`,
`MoCoV2`, `BYOL` and `C2BIN`, which is BYOL plus cluster heads.

For lightly's own benchmarks there are `register` and `python -m c2bin_lightly` (the ImageNet
scripts) and the four methods as BenchmarkModules (the CIFAR-10 benchmark).
"""

try:
    import lightly as _lightly  # noqa: F401
except ImportError as error:
    raise ImportError('c2bin_lightly needs lightly: pip install "c2bin-ext[lightly]"') from error

from c2bin_ext.checkpoints import load_backbone
from c2bin_lightly.benchmark import (
    BYOLBenchmark,
    C2BINBenchmark,
    C2BINResNet50,
    MoCoV2Benchmark,
    SimCLRBenchmark,
    register,
    transform,
)
from c2bin_lightly.training import BYOL, C2BIN, MoCoV2, Optimization, SimCLR

__all__ = [
    "BYOL",
    "C2BIN",
    "BYOLBenchmark",
    "C2BINBenchmark",
    "C2BINResNet50",
    "MoCoV2",
    "MoCoV2Benchmark",
    "Optimization",
    "SimCLR",
    "SimCLRBenchmark",
    "load_backbone",
    "register",
    "transform",
]
