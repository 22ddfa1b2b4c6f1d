"""The tables of scripts/compare_pruning.py, a module each, and what they share."""
