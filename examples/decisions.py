"""What each open choice of C2BIN does: see --help and experiments/decisions.py."""

import sys

from experiments.decisions import main

if __name__ == "__main__":
    sys.exit(main())
