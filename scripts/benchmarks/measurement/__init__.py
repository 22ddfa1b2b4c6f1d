"""Shared parts of the benchmarks: options, rows of results, timing, networks, the machine."""
