"""What every benchmark is told."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """How much to measure.

    Attributes:
        rounds: repetitions of which the median counts.
        short: less work a repetition, to see that a benchmark runs; its figures are not to be published.
        plots: folder for plots; None draws none.
        quiet: no lines on stderr while it measures.
    """

    rounds: int = 5
    short: bool = False
    plots: Path | None = None
    quiet: bool = False

    def say(self, line: str) -> None:
        if not self.quiet:
            print(f"  {line}", file=sys.stderr, flush=True)
