"""The application on a folder of images: C2BIN's clusters and neighbours in one HTML page.

`c2bin-explore FOLDER`, or `python -m c2bin_explore FOLDER`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `c2bin-explore`.

    Args:
        arguments: What stands after the command's name; by default what the shell gave.

    Returns:
        The exit status: 0; 1 after an error, which is printed; 130 after Ctrl-C.

    Raises:
        SystemExit: After `--help`, and with status 2 if an argument is unknown or malformed.

    Examples:
        >>> main(["there-is-no-such-folder"])
        1
    """
    try:
        # Not at the top: without the extra, the command says so in one line.
        from c2bin_explore import cli
    except ImportError as error:
        needs = 'c2bin-explore needs its extra: pip install "c2bin-ext[explore]"'
        print(f"{needs} ({error})", file=sys.stderr)
        return 1
    return cli.main(arguments)
