"""Classifiers for the evaluation of generated images."""
