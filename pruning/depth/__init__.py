"""Depth pruning: whole residual and attention blocks are removed."""
