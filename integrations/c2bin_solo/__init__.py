"""C2BIN as a method of solo-learn, trained and evaluated by solo-learn's own scripts.

`register` puts the method beside SimCLR, MoCo v2 and BYOL. With Hydra, which main_pretrain and
main_linear use, that needs no call: a plugin installed with this package registers the method and
makes the configs known, so that `python main_pretrain.py --config-name c2bin-cifar10` works in an
unmodified checkout. For the scripts without Hydra there is `python -m c2bin_solo main_knn.py …`.
"""

try:
    import solo.methods as _methods  # noqa: F401
except ImportError as error:
    raise ImportError(
        'c2bin_solo needs solo-learn: pip install "c2bin-ext[solo]", then pip install --no-deps '
        '--no-build-isolation "solo-learn @ git+https://github.com/vturrisi/solo-learn" '
        f"({error})"
    ) from error

from c2bin_ext.checkpoints import load_backbone
from c2bin_solo.method import C2BIN
from c2bin_solo.registration import register

__all__ = ["C2BIN", "load_backbone", "register"]
