"""C2BIN and its baselines, tuned alike and compared: see --help and experiments/study.py."""

import sys

from experiments.study import main

if __name__ == "__main__":
    sys.exit(main())
