"""Pruning of diffusion networks: masks over weights, and removal of whole channels. Builds on the core."""
