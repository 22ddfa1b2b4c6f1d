"""Lottery tickets: masks from rounds of training, and their report."""
