"""The experiments of the C2BIN paper: `python examples/paper.py --help`."""
