"""Prints the top-level modules that importing the package adds to torch's and Python's own."""

import sys


def top() -> set[str]:
    return {name.partition(".")[0] for name in sys.modules}


if __name__ == "__main__":
    import torch  # noqa: F401

    before = top()
    import c2bin_ext  # noqa: F401

    print(" ".join(sorted(top() - before - set(sys.stdlib_module_names))))
