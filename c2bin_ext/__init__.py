"""C2BIN's losses and layers: contrast cluster assignments while bootstrapping instances."""

from c2bin_ext import functional
from c2bin_ext.functional import C2BINLossOutput
from c2bin_ext.heads import MultiScaleClusterHead
from c2bin_ext.losses import (
    BCAContrastiveLoss,
    BootstrapAlignmentLoss,
    C2BINLoss,
    ClusterEntropyRegularizer,
)

__version__ = "0.1.0"

__all__ = [
    "BCAContrastiveLoss",
    "BootstrapAlignmentLoss",
    "C2BINLoss",
    "C2BINLossOutput",
    "ClusterEntropyRegularizer",
    "MultiScaleClusterHead",
    "__version__",
    "functional",
]
