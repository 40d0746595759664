"""The explorer's former place, for one more release: it is `c2bin_explore`."""

import sys
import warnings

import c2bin_explore


def main(arguments: list[str] | None = None) -> int:
    """Run `c2bin_explore.main`, after a word that this place goes."""
    said = "c2bin_lightly.explore goes with the next release: use python -m c2bin_explore"
    warnings.warn(said, DeprecationWarning, stacklevel=2)
    return c2bin_explore.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
