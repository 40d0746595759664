"""C2BIN through solo-learn's own scripts: see --help and experiments/solo_host.py."""

import sys

from experiments.solo_host import main

if __name__ == "__main__":
    sys.exit(main())
