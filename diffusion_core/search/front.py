"""The Pareto front of several objectives, and the hypervolume that it dominates.

Goals are those of the coordinates of a point: which way each is better.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusion_core.config.metrics import Goal

Point = Sequence[float]
"""A value of each objective, in the order of the goals."""


def pareto_front(points: Sequence[Point | None], goals: Sequence[Goal]) -> list[int]:
    """Return the indices of the points on the front, the best in the first objective first.

    A point is on the front if no other one is at least as good in all objectives, and better in one. Equal points are
    on it together.

    Args:
        points: finite values of all objectives; None is never on the front.
        goals: which way each objective is better.
    """
    known = sorted((_losses(point, goals), index) for index, point in enumerate(points) if point is not None)
    front: list[tuple[tuple[float, ...], int]] = []
    for losses, index in known:
        # In this order, a point is dominated only by earlier ones, and then by one of the front.
        if not any(other != losses and _covers(other, losses) for other, _ in front):
            front.append((losses, index))
    return [index for _, index in front]


def layers(points: Sequence[Point | None], goals: Sequence[Goal]) -> list[list[int]]:
    """Return the indices of the points in layers: the front, then the front of those that are left, and so on.

    This is the non-dominated sorting of Deb et al. 2002 (NSGA-II). Points that are None are in no layer.
    """
    left = list(points)
    found = []
    while front := pareto_front(left, goals):
        found.append(front)
        for index in front:
            left[index] = None
    return found


def hypervolume(points: Sequence[Point], goals: Sequence[Goal], reference: Point) -> float:
    """Return the volume that is at least as good as the reference, and not better than some point (Zitzler 1999).

    Its unit is the product of the units of the objectives. It is exact; the time grows with the number of points on the
    front to the power of the objectives.

    Args:
        points: finite values of all objectives. Those that are not better than the reference in all add nothing.
        goals: which way each objective is better.
        reference: the worst values of interest.
    """
    front = [_losses(points[index], goals) for index in pareto_front(points, goals)]
    bound = _losses(reference, goals)
    return _volume([point for point in front if all(a < b for a, b in zip(point, bound, strict=True))], bound)


def _losses(point: Point, goals: Sequence[Goal]) -> tuple[float, ...]:
    """Return a point as values of which smaller ones are better."""
    return tuple(value if goal == "minimize" else -value for value, goal in zip(point, goals, strict=True))


def _covers(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def _volume(points: list[tuple[float, ...]], bound: tuple[float, ...]) -> float:
    """Return the volume between points and a bound that all are below: slice it along the last coordinate."""
    if not points:
        return 0.0
    if len(bound) == 1:
        return bound[0] - min(point[0] for point in points)
    points = sorted(points, key=lambda point: point[-1])
    ends = [*(point[-1] for point in points[1:]), bound[-1]]
    # Between two values of the last coordinate, the points below them dominate.
    return sum(
        (end - point[-1]) * _volume([below[:-1] for below in points[: place + 1]], bound[:-1])
        for place, (point, end) in enumerate(zip(points, ends, strict=True))
        if end > point[-1]
    )
