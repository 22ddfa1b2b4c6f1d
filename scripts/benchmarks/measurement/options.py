"""Options of all benchmarks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """How much to measure, and where to report it.

    Attributes:
        rounds: number of repetitions; the median counts.
        short: less work per repetition, to check that a benchmark runs; do not publish its figures.
        plots: folder for plots; None draws none.
        quiet: print no progress on stderr.
    """

    rounds: int = 5
    short: bool = False
    plots: Path | None = None
    quiet: bool = False

    def say(self, line: str) -> None:
        """Print a line of progress."""
        if not self.quiet:
            print(f"  {line}", file=sys.stderr, flush=True)
