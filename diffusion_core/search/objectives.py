"""The objectives of a sweep: figures that its trials are judged by, and the Pareto front of its trials.

A sweep file names one figure (``metric:``) or several (``metrics:``). Figures of cost may be among several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_core.config.metrics import COSTS, Goal, goal_of
from diffusion_core.search.front import Point, hypervolume, pareto_front


@dataclass(frozen=True)
class Objective:
    """A figure that a search makes better.

    Attributes:
        name: the figure.
        goal: which way it is better.
        limit: the worst value that is of use; None: any is.
    """

    name: str
    goal: Goal
    limit: float | None = None

    def excess(self, value: float) -> float:
        """Return by how much a value is worse than the limit; 0 or less if it is of use."""
        if self.limit is None:
            return 0.0
        return value - self.limit if self.goal == "minimize" else self.limit - value


def objectives_of(config: Mapping[str, Any]) -> list[Objective]:
    """Return the objectives of a checked sweep's configuration, in its order; none if it names none."""
    named = config.get("metrics") or ([config["metric"]] if config.get("metric") else [])
    return [Objective(each["name"], each.get("goal", "minimize"), each.get("limit")) for each in named]


def objective_goal(name: str) -> Goal | None:
    """Return which way a figure is better as one of several objectives; None if it cannot be one."""
    return "minimize" if name in COSTS else goal_of(name)


def point_of(figures: Mapping[str, float], objectives: Sequence[Objective]) -> Point | None:
    """Return the values of all objectives; None if one is missing, NaN or infinite."""
    values = [figures.get(objective.name, math.nan) for objective in objectives]
    return values if all(map(math.isfinite, values)) else None


def is_of_use(point: Point, objectives: Sequence[Objective]) -> bool:
    """Return whether no value is worse than its limit."""
    return all(each.excess(value) <= 0.0 for each, value in zip(objectives, point, strict=True))


def goals_in_words(objectives: Sequence[Objective]) -> str:
    """Return what a search makes better: ``eval/class_agreement (maximize) and sample/macs (minimize)``."""
    return " and ".join(f"{objective.name} ({objective.goal})" for objective in objectives)


@dataclass(frozen=True)
class Front:
    """The Pareto front of the trials of a sweep.

    Attributes:
        trials: indices of the trials on it, the best in the first objective first.
        reference: the value of each objective from which the hypervolume is measured.
        volume: the hypervolume, in the product of the units of the objectives.
    """

    trials: Sequence[int]
    reference: Point
    volume: float


def front_among(points: Sequence[Point | None], objectives: Sequence[Objective]) -> Front:
    """Return the Pareto front of trials. Trials beyond a limit are not on it.

    The hypervolume is measured from the limits. An objective without one is measured from the worst value among all
    points; such a hypervolume cannot be compared with that of another sweep.
    """
    goals = [objective.goal for objective in objectives]
    known = [point for point in points if point is not None]
    used = [point if point is not None and is_of_use(point, objectives) else None for point in points]
    chosen = pareto_front(used, goals)
    reference = []
    for place, objective in enumerate(objectives):
        values = [point[place] for point in known]
        worst = (max if objective.goal == "minimize" else min)(values, default=math.nan)
        reference.append(worst if objective.limit is None else objective.limit)
    front = [point for index in chosen if (point := points[index]) is not None]
    return Front(chosen, reference, hypervolume(front, goals, reference) if front else 0.0)
