"""`python -m c2bin_explore` is `c2bin-explore`."""

import sys

from c2bin_explore import main

if __name__ == "__main__":
    sys.exit(main())
