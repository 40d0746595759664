"""Clusters of a pretrained network's features: C2BIN and other methods in one table."""
