"""C2BIN for lightly: its baselines and C2BIN as LightningModules over any backbone.

lightly's pip package has the building blocks (heads, losses, momentum update, LARS, schedules) and
leaves the methods to its benchmark scripts. This package puts the blocks together: `SimCLR`,
`MoCoV2`, `BYOL` and `C2BIN`, which is BYOL plus cluster heads. `c2bin_lightly.evaluate` scores
frozen features with lightly's kNN, a linear probe and k-means.
"""

try:
    import lightly as _lightly  # noqa: F401
except ImportError as error:
    raise ImportError('c2bin_lightly needs lightly: pip install "c2bin-ext[lightly]"') from error

from c2bin_lightly import evaluate
from c2bin_lightly.methods import BYOL, C2BIN, MoCoV2, Optimization, SimCLR

__all__ = ["BYOL", "C2BIN", "MoCoV2", "Optimization", "SimCLR", "evaluate"]
