"""The Pareto front: the trials that no other trial beats in both quality and cost."""

from __future__ import annotations

from collections.abc import Sequence

from diffusion_core.config.metrics import Goal


def pareto_front(points: Sequence[tuple[float, float] | None], goal: Goal) -> list[int]:
    """Return the indices of the points on the front, cheapest first.

    A point is on the front if no other one is at least as cheap and at least as good, and better in one of the two.
    Equal points are on it together.

    Args:
        points: cost (smaller is cheaper) and quality, both finite; None is never on the front.
        goal: which way quality is better.
    """
    sign = 1.0 if goal == "minimize" else -1.0
    known = sorted((point[0], sign * point[1], index) for index, point in enumerate(points) if point is not None)
    front: list[int] = []
    best: tuple[float, float] | None = None
    for cost, loss, index in known:
        if best is None or loss < best[1]:
            best = (cost, loss)
        if (cost, loss) == best:
            front.append(index)
    return front
