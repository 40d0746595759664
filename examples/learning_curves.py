"""Who leads after how many epochs: see --help and experiments/learning_curves.py."""

import sys

from experiments.learning_curves import main

if __name__ == "__main__":
    sys.exit(main())
