"""Structured pruning: remove channels."""
