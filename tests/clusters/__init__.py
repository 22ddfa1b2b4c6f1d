"""Slurm for tests: a real one, and fake commands."""
