"""Compare clusterings of a pretrained network's features: see `experiments/features/command.py`.

python examples/features.py --images FOLDER
"""

import sys

from experiments.features.command import main

if __name__ == "__main__":
    sys.exit(main())
