"""The names of figures, and which way each is better. A name is a pattern where it carries a count or a data set."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from typing import Literal

Goal = Literal["minimize", "maximize"]

GOALS: dict[str, Goal] = {
    "train/loss": "minimize",
    "val/loss": "minimize",
    "val/loss_t*": "minimize",
    "eval/class_agreement": "maximize",
    "eval/synthetic_accuracy*": "maximize",
    "eval/fid*": "minimize",
    "eval/fd_*": "minimize",
    "eval/kid*": "minimize",
    "eval/kd_*": "minimize",
    "eval/inception_score*": "maximize",
    "eval/score_*": "maximize",
    "eval/precision_*": "maximize",
    "eval/recall_*": "maximize",
    "eval/density_*": "maximize",
    "eval/coverage_*": "maximize",
    "eval/consistency_ssim*": "maximize",
    "eval/consistency_mse*": "minimize",
}
"""Which way figures are better, by name or pattern (``*``); the first that matches counts."""

FID_FROM = 2048
"""Samples from which on a Fréchet distance in Inception's features is called FID: with fewer, the covariance of 2048
features is singular, and the figure says more of the number of samples than of the images."""

INCEPTION = "inception"
"""The feature space of pytorch-fid's network with the published weights."""

SHORT = {"fd": "fid", "kd": "kid", "score": "inception_score"}
"""What distances and scores are called in that space."""

LOSS_BUCKETS = 10
"""Parts of equal length that the timesteps are dealt out to for ``val/loss_t0`` to ``val/loss_t9``."""


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


def count_name(count: int | None) -> str:
    """A number of images as names carry it: ``50k``, ``2048``; nothing where it is not known."""
    if count is None:
        return ""
    return f"{count // 1000}k" if count and count % 1000 == 0 else str(count)


def space_name(text: str) -> str:
    """A file's name as the name of a feature space: letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "features"


def space_figure(
    figure: str, space: str, count: int | None, reference: str | None, reference_count: int | None = None
) -> str:
    """The name of a figure in a feature space: ``eval/fid50k_train``, ``eval/fd_classifier-digits_500_train``.

    Args:
        figure: ``fd`` (Fréchet distance), ``kd`` (kernel distance), ``score``, ``precision``, ``recall``, ``density``
            or ``coverage``.
        space: name of the feature space.
        count: generated images; None where a file of statistics does not say.
        reference: what they are compared to; None for a score, which compares to nothing.
        reference_count: its images, if known.
    """
    known = [number for number in (count, reference_count) if number is not None]
    if space == INCEPTION and figure in SHORT and (figure != "fd" or min(known, default=0) >= FID_FROM):
        return "_".join(part for part in (f"eval/{SHORT[figure]}{count_name(count)}", reference) if part)
    return "_".join(part for part in (f"eval/{figure}", space, count_name(count), reference) if part)
