"""Pareto fronts and hypervolumes, by brute force and by numbers that were worked out by hand."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest

from diffusion_core.search.front import hypervolume, layers, pareto_front
from diffusion_core.search.objectives import Objective, front_among, point_of

GOALS: tuple[Literal["minimize", "maximize"], ...] = ("minimize", "maximize")
Point = tuple[float, ...]


def beats(one: Point, other: Point, goals: Sequence[str]) -> bool:
    """Whether a point is at least as good as another one everywhere, and better somewhere."""
    signs = [1 if goal == "minimize" else -1 for goal in goals]
    return one != other and all(s * a <= s * b for s, a, b in zip(signs, one, other, strict=True))


def drawn(draw: random.Random, objectives: int, most: int = 14) -> list[Point | None]:
    """Draw points on a coarse grid, where many are equal in a coordinate; some are missing."""
    return [
        None if draw.random() < 0.1 else tuple(float(draw.randint(0, 6)) for _ in range(objectives))
        for _ in range(draw.randint(0, most))
    ]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_front_is_what_nothing_beats(objectives: int) -> None:
    for seed in range(40):
        draw = random.Random(seed)
        places, goals = drawn(draw, objectives), [draw.choice(GOALS) for _ in range(objectives)]
        known = [place for place in places if place is not None]
        expected = {
            index
            for index, place in enumerate(places)
            if place is not None and not any(beats(other, place, goals) for other in known)
        }
        found = pareto_front(places, goals)
        assert set(found) == expected
        assert len(found) == len(expected)
        sign = 1 if goals[0] == "minimize" else -1
        first = [sign * place[0] for place in (places[index] for index in found) if place is not None]
        assert first == sorted(first)


def test_layers_are_fronts_of_what_is_left() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        places = drawn(draw, 2)
        found = layers(places, ["minimize", "maximize"])
        assert sorted(itertools.chain(*found)) == [index for index, place in enumerate(places) if place is not None]
        for number, layer in enumerate(found):
            rest = {index for later in found[number:] for index in later}
            left = [place if index in rest else None for index, place in enumerate(places)]
            assert layer == pareto_front(left, ["minimize", "maximize"])


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_hypervolume_is_the_number_of_cells_that_a_point_dominates(objectives: int) -> None:
    for seed in range(30):
        draw = random.Random(seed)
        goals = [draw.choice(GOALS) for _ in range(objectives)]
        places = [place for place in drawn(draw, objectives) if place is not None]
        signs = np.array([1.0 if goal == "minimize" else -1.0 for goal in goals])
        reference = [float(draw.randint(2, 5)) for _ in goals]
        # Points and reference have whole coordinates, so each cell of side 1 is dominated as a whole or not at all.
        axes = [np.arange(-7, 7) + 0.5] * objectives
        middles = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, objectives)
        inside = (middles <= signs * reference).all(1)
        covered = np.zeros(len(middles), bool)
        for place in places:
            covered |= (signs * np.array(place) <= middles).all(1)
        assert hypervolume(places, goals, reference) == pytest.approx(float((inside & covered).sum()))


def test_a_hypervolume_that_was_worked_out_by_hand() -> None:
    # Quality up from 0, cost down from 10: a staircase of 2 x 6, 3 x 4 and 1 x 1, each above the ones before.
    points = [(0.6, 8.0), (0.5, 7.0), (0.2, 4.0), (0.1, 9.0)]
    expected = 0.2 * 6.0 + 0.3 * 3.0 + 0.1 * 2.0
    assert hypervolume(points, ["maximize", "minimize"], (0.0, 10.0)) == pytest.approx(expected)
    assert hypervolume(points[:1], ["maximize", "minimize"], (0.7, 10.0)) == 0.0, "no better than the reference"
    assert hypervolume([], ["maximize", "minimize"], (0.0, 10.0)) == 0.0


QUALITY, COST = Objective("eval/class_agreement", "maximize"), Objective("sample/macs", "minimize")


def test_without_limits_the_worst_trial_is_the_reference() -> None:
    front = front_among([(0.5, 2.0), None, (0.9, 8.0), (0.4, 3.0)], [QUALITY, COST])
    assert (list(front.trials), list(front.reference)) == ([2, 0], [0.4, 8.0])
    assert front.volume == pytest.approx(0.1 * 6.0)  # The dearest trial is on the edge.
    empty = front_among([None], [QUALITY, COST])
    assert (list(empty.trials), empty.volume) == ([], 0.0)
    assert all(math.isnan(value) for value in empty.reference)


def test_trials_beyond_a_limit_are_not_on_the_front() -> None:
    limited = [Objective("eval/class_agreement", "maximize", 0.45), Objective("sample/macs", "minimize", 10.0)]
    front = front_among([(0.5, 2.0), (0.9, 8.0), (0.4, 1.0), (0.99, 11.0)], limited)
    assert (list(front.trials), list(front.reference)) == ([1, 0], [0.45, 10.0])
    assert front.volume == pytest.approx(0.45 * 2.0 + 0.05 * 6.0)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_trial_without_a_finite_value_of_each_objective_is_nowhere(value: float | None) -> None:
    figures = {"eval/class_agreement": 0.5} | ({} if value is None else {"sample/macs": value})
    assert point_of(figures, [QUALITY, COST]) is None
