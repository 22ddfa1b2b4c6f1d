"""Shared parts of the scripts that compare many trainings, and the tables of scripts/compare_pruning.py."""
