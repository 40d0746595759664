"""What is installed: `python -m c2bin_ext`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from c2bin_ext import __version__

_EXTRAS = {
    "eval": ("scikit-learn", "scipy"),
    "testing": ("hypothesis",),
    "lightly": ("lightly", "pytorch-lightning"),
    "explore": ("lightly", "pillow", "torchvision", "pyarrow", "efficientnet-lite-pytorch"),
    "solo": ("solo-learn", "lightning", "hydra-core"),
}


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def main() -> None:
    """Print the versions of this package, of torch, and of what each extra brings."""
    print(f"c2bin-ext {__version__}, Python {platform.python_version()}, {_installed('torch')}")
    for extra, packages in _EXTRAS.items():
        print(f"[{extra}] {', '.join(_installed(package) for package in packages)}")


if __name__ == "__main__":
    main()
