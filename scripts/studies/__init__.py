"""Studies that take many trainings: the tables of scripts/compare_pruning.py, and what they share."""
