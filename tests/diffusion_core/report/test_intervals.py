"""Intervals, against scipy, a published table, and simulation."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from diffusion_core.report.intervals import Interval, difference, may_be_equal, mean_interval, wilson


@pytest.mark.parametrize("count", [1, 2, 10, 200, 50_000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_of_a_share_is_that_of_scipy(count: int, share: float, confidence: float) -> None:
    hits = round(share * count)
    ours = wilson(hits / count, count, confidence)
    theirs = stats.binomtest(hits, count).proportion_ci(confidence, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.low <= hits / count <= ours.high


@pytest.mark.parametrize(("share", "count"), [(1.1, 10), (-0.1, 10), (0.5, 0), (math.nan, 10)])
def test_no_share_has_no_interval(share: float, count: int) -> None:
    with pytest.raises(ValueError, match="expected a share"):
        wilson(share, count)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.31, 0.29], list(range(20))])
def test_the_interval_of_a_mean_is_that_of_scipy(values: list[float]) -> None:
    ours = mean_interval(values)
    theirs = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx(theirs)
    with pytest.raises(ValueError, match="at least two"):
        mean_interval(values[:1])


def test_it_holds_the_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    held = []
    for _ in range(4000):
        found = mean_interval(draw.normal(3.0, 2.0, size=4).tolist())
        held.append(found.low <= 3.0 <= found.high)
    # Four standard deviations of a share of 4000.
    assert statistics.fmean(held) == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((10, 10), (0, 20), 0.6791, 1.0)],
)
def test_the_difference_of_shares_is_in_the_table_of_newcombe(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    """Newcombe (1998), Statistics in Medicine 17, 873-890, table II, method 10."""
    one, two = first[0] / first[1], second[0] / second[1]
    found = difference(one, wilson(one, first[1]), two, wilson(two, second[1]))
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)


def test_equal_seeds_are_called_different_as_seldom_as_it_says() -> None:
    """Two configurations with the same distribution, three seeds each."""
    draw = np.random.default_rng(1)
    told_apart = 0
    for _ in range(2000):
        one, two = draw.normal(size=(2, 3)).tolist()
        told_apart += not may_be_equal(
            statistics.fmean(one), mean_interval(one), statistics.fmean(two), mean_interval(two)
        )
    assert told_apart / 2000 < 0.05 + 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_far_apart_is_told_apart() -> None:
    assert not may_be_equal(0.9, Interval(0.88, 0.92), 0.5, Interval(0.4, 0.6))
    assert may_be_equal(0.9, Interval(0.88, 0.92), 0.89, Interval(0.87, 0.91))
