"""The packages behind the launchers in `examples/`."""
