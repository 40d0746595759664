"""C2BIN for lightly: its baselines and C2BIN as LightningModules over any backbone.

lightly's pip package has the building blocks and leaves the methods to its benchmark scripts. For
those there are `register` and `python -m c2bin_lightly` (ImageNet) and BenchmarkModules (CIFAR-10).
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
