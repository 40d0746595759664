"""The explorer's former place, for one more release: it is `c2bin_explore`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import c2bin_explore

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `c2bin-explore`, after a word that this way of calling it ends; see `c2bin_explore`."""
    warnings.warn(
        "c2bin_lightly.explore is c2bin_explore now and goes with the next release: call "
        "c2bin-explore or python -m c2bin_explore",
        DeprecationWarning,
        stacklevel=2,
    )
    return c2bin_explore.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
