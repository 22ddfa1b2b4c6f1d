"""Which trials of a sweep are better: one rule for all that rank them.

These are the terminal, the files of results, ``metric.target``, the report, and the commands that take a sweep's best
trial. Trials that ended come first, by their figures; a trial that failed is never the best.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from diffusion_core.config.metrics import place

ENDED = frozenset({"finished", "stopped"})
"""States of trials that ended by themselves, and of those that early termination stopped: one of them is the best."""
BROKEN = frozenset({"failed", "crashed"})
"""States of trials that failed, here or on W&B. They are never the best, whatever they measured until then."""


class Judged(Protocol):
    """A trial, as far as it is judged."""

    @property
    def state(self) -> str:
        """Its state."""

    @property
    def figures(self) -> Mapping[str, float]:
        """What was measured of it."""


def judged(trial: Judged) -> Mapping[str, float]:
    """Return the figures that count for a trial: none if it failed."""
    return {} if trial.state in BROKEN else trial.figures


def trial_order(trial: Judged, metric: str | None, *, maximize: bool) -> tuple[int, int, float]:
    """Return what sorts trials: those that have ended, those that have not, then those that failed.

    Each of these groups is sorted by a metric, best first, as :func:`place` sorts values.
    """
    group = 0 if trial.state in ENDED else 2 if trial.state in BROKEN else 1
    return group, *place(judged(trial).get(metric or ""), maximize)
