"""Clusters of a pretrained network's features: C2BIN beside k-means and other methods, one table."""
