"""The classifiers that judge generated images."""
