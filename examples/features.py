"""Compare clusterings of a pretrained network's features: see --help and experiments/features/."""

import sys

from experiments.features.command import main

if __name__ == "__main__":
    sys.exit(main())
