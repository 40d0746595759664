"""The experiments of the C2BIN paper: see --help and experiments/paper/."""

import sys

from experiments.paper.cli import main

if __name__ == "__main__":
    sys.exit(main())
