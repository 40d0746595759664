"""Hydra configs for solo-learn's main_pretrain.py and main_linear.py."""
