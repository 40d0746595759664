"""C2BIN's losses and layers: contrast cluster assignments while bootstrapping instances."""

from c2bin_ext import functional
from c2bin_ext.functional import C2BINLossOutput, ClusterLossOutput
from c2bin_ext.heads import MultiScaleClusterHead
from c2bin_ext.losses import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    ClusterEntropyRegularizer,
    MultiScaleClusterLoss,
)
from c2bin_ext.objective import C2BINObjective

__version__ = "0.1.0"

__all__ = [
    "BCAContrastiveLoss",
    "BootstrapAlignmentLoss",
    "C2BINLoss",
    "C2BINLossOutput",
    "C2BINObjective",
    "ClusterEntropyRegularizer",
    "ClusterLossOutput",
    "MultiScaleClusterHead",
    "MultiScaleClusterLoss",
    "__version__",
    "functional",
]
