"""What somebody should look at, told through W&B's alerts."""

from __future__ import annotations

import math
from typing import Any

from diffusion_core.figure_names import goal_of
from diffusion_core.tracking import Tracker
from diffusion_core.trainer import TrainState

WORSE_LOSS = 1.5
"""A loss this many times its best value is a regression."""

WORSE_SHARE = 0.75
"""So is a quality that fell to this share of its best value."""

PREEMPTIONS = 3
"""A trial that was preempted this often makes little progress."""

DIVERGED = "Training diverged"
REGRESSION = "Quality regression"
PREEMPTED = "Preempted again and again"


class WatchQuality:
    """A training callback: an alert, once, when the metric that chooses the best checkpoint has become much worse.

    Args:
        metric: its name; what is measured before a pruning has another one.
        best: its best value so far, or None.
        tracker: where alerts go.
    """

    def __init__(self, metric: str, best: float | None, tracker: Tracker) -> None:
        self.metric = metric
        self.best = best
        self.tracker = tracker
        self.told = False

    def __call__(self, state: TrainState, row: dict[str, Any]) -> None:
        value = row.get(self.metric)
        if value is None:
            return
        if self.best is not None and not self.told and is_regression(self.metric, value, self.best):
            self.told = True
            self.tracker.alert(REGRESSION, f"{self.metric} = {value:.4g} at step {state.step}; it was {self.best:.4g}")
        if math.isfinite(value):
            better = min if goal_of(self.metric) == "minimize" else max
            self.best = value if self.best is None else better(value, self.best)


def is_regression(metric: str, value: float, best: float) -> bool:
    """Whether a figure is much worse than its best value; what is no number is."""
    if not math.isfinite(value):
        return True
    if goal_of(metric) == "minimize":
        return value > WORSE_LOSS * best > 0
    return value < WORSE_SHARE * best
