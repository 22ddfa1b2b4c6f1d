"""The names of figures, and which way each is better. A name is a pattern where it carries a count or a data set."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Literal

Goal = Literal["minimize", "maximize"]

GOALS: dict[str, Goal] = {
    "train/loss": "minimize",
    "val/loss": "minimize",
    "eval/class_agreement": "maximize",
}
"""Which way figures are better, by name or pattern (``*``); the first that matches counts."""


def goal_of(name: str) -> Goal | None:
    """Which way a figure is better; None for one that is neither good nor bad (a cost, a rate, a count)."""
    return next((goal for pattern, goal in GOALS.items() if fnmatchcase(name, pattern)), None)


def is_better(metric: str, value: float, than: float | None) -> bool:
    """Whether a figure is strictly better than another one (None: there is none yet); what is no number never is.

    Raises:
        ValueError: if the figure has no better way.
    """
    goal = goal_of(metric)
    if goal is None:
        raise ValueError(f"{metric}: not a figure that is better one way; expected one of {', '.join(GOALS)}")
    if not math.isfinite(value):
        return False
    if than is None:
        return True
    return value < than if goal == "minimize" else value > than
