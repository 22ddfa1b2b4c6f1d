"""Uncertainty of figures: intervals for a share of images, for a mean over seeds, and for a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An interval that holds the true value with a probability of ``CONFIDENCE``.

    Attributes:
        low: its lower end.
        high: its upper end.
        how: what it was computed from, in a few words.
    """

    low: float
    high: float
    how: str = ""


def wilson(share: float, count: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the score interval of a share of independent images (Wilson 1927).

    Args:
        share: the measured share, in [0, 1].
        count: number of images, at least 1.
        confidence: probability that the interval holds the true share.

    Raises:
        ValueError: if the share is outside of [0, 1] or there is no image.
    """
    if not 0.0 <= share <= 1.0 or count < 1:
        raise ValueError(f"share {share} of {count} images: expected a share in [0, 1] of at least one image")
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    scale = 1.0 + z * z / count
    middle = (share + z * z / (2.0 * count)) / scale
    half = z / scale * math.sqrt(share * (1.0 - share) / count + z * z / (4.0 * count * count))
    # At the ends of [0, 1] the formula is exact, and rounding would leave the share outside.
    low = 0.0 if share == 0.0 else middle - half
    high = 1.0 if share == 1.0 else middle + half
    return Interval(low, high, f"Wilson interval of {count:,} images")


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return Student's interval of the mean of independent repetitions.

    Raises:
        ValueError: if there are fewer than two values.
    """
    from scipy.special import stdtrit  # Slow to import.

    count = len(values)
    if count < 2:
        raise ValueError(f"{count} values: expected at least two")
    half = float(stdtrit(count - 1, 0.5 + confidence / 2.0)) * stdev(values) / math.sqrt(count)
    return Interval(fmean(values) - half, fmean(values) + half, f"t interval of {count} seeds")


def difference(first: float, of_first: Interval, second: float, of_second: Interval) -> Interval:
    """Return the interval of ``first - second``, recovered from the intervals of both (Zou & Donner 2008).

    For two shares with Wilson's intervals it is method 10 of Newcombe (1998).
    """
    below = math.hypot(first - of_first.low, of_second.high - second)
    above = math.hypot(of_first.high - first, second - of_second.low)
    return Interval(first - second - below, first - second + above)


def may_be_equal(first: float, of_first: Interval, second: float, of_second: Interval) -> bool:
    """Return whether the interval of the difference contains zero: the measurements do not tell the two apart."""
    found = difference(first, of_first, second, of_second)
    return found.low <= 0.0 <= found.high
