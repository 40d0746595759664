"""SimCLR, MoCo v2, BYOL and C2BIN, trained alike: see --help and experiments/demo.py."""

import sys

from experiments.demo import main

if __name__ == "__main__":
    sys.exit(main())
