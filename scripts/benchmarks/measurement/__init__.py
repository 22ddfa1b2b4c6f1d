"""What all benchmarks share: options, rows of results, timing, networks, the machine."""
