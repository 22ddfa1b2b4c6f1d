"""Unstructured pruning: masks over weights."""
