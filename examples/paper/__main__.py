"""Run one experiment of the C2BIN paper: see `python examples/paper --help`."""

import sys
from pathlib import Path

# The experiments share data, training and pictures with the demo, whose modules lie in examples/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paper.cli import main

if __name__ == "__main__":
    sys.exit(main())
