"""C2BIN through lightly's own benchmark: see --help and experiments/lightly_host.py."""

import sys

from experiments.lightly_host import main

if __name__ == "__main__":
    sys.exit(main())
