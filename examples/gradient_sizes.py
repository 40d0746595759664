"""How large the gradient of each term is: see --help and experiments/gradients.py."""

import sys

from experiments.gradients import main

if __name__ == "__main__":
    sys.exit(main())
