"""Names of figures, and which way each is better. Figures that can be chosen by name are records of ``METRICS``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal, TypeVar

from diffusion_core.registries import METRICS

T = TypeVar("T")
Goal = Literal["minimize", "maximize"]

OTHER_GOALS: dict[str, Goal] = {
    "train/loss": "minimize",
    "val/loss": "minimize",
    "eval/class_agreement": "maximize",
    "eval/consistency_ssim*": "maximize",
    "eval/consistency_mse*": "minimize",
}
"""Goals of the figures that ``eval.figures`` does not choose, by name or pattern (``*``)."""

COSTS = {
    "sample/macs": "MACs of one image",
    "sample/evaluations": "network evaluations of one image",
    "sample/seconds": "time of one image (s)",
    "model/macs": "MACs of one network evaluation",
    "model/nonzero_macs": "MACs with weights that are not pruned",
    "model/params": "parameters",
    "model/nonzero_params": "parameters that are not pruned",
    "model/latency": "latency of 16 images (ms)",
    "model/latency_single": "latency of one image (ms)",
    "model/checkpoint_bytes": "size of the checkpoint (bytes)",
}
"""Figures of cost that every finished trial has, smaller is cheaper, and their labels."""

FID_FROM = 2048
"""Fewest images on both sides for which a Fréchet distance in Inception's features is called FID. With fewer, the
covariance of the 2048 features is singular, and the distance depends mostly on the number of images."""

LOSS_BUCKETS = 10
"""Number of equal ranges of timesteps, for ``val/loss_t0`` to ``val/loss_t9``."""

INCEPTION = "inception"
"""Name of the feature space of pytorch-fid's network with the published weights."""

EFFICIENTNET = "efficientnet-lite0"
"""Name of the feature space of EfficientNet-Lite0, whose weights come with an extra."""

EXTRACTORS = (INCEPTION, "classifier", EFFICIENTNET)
"""Names of feature networks; all others are files."""

TORCHSCRIPT_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")
"""Suffixes of files of feature networks in TorchScript."""


@dataclass(frozen=True)
class Part:
    """One number of a figure in a feature space.

    Attributes:
        name: its name in figures, such as ``fd``.
        goal: which way it is better.
        inception: its customary name in Inception's features, such as ``fid``; None if it has none.
        inception_from: fewest images on both sides for which that name is used.
    """

    name: str
    goal: Goal
    inception: str | None = None
    inception_from: int = 0

    def goals(self) -> dict[str, Goal]:
        """Return the goal, by the patterns of the part's names."""
        names = [f"eval/{self.name}_*", *([f"eval/{self.inception}*"] if self.inception else [])]
        return dict.fromkeys(names, self.goal)


_GIVEN: ContextVar[Mapping[str, Goal] | None] = ContextVar("goals", default=None)


@contextmanager
def given_goals(table: Mapping[str, Goal]) -> Iterator[None]:
    """Inside this context, take the goals of figures from a table, which :func:`goals` returned in another process.

    Records of ``METRICS`` are then not looked up, so that the modules behind them are not imported.
    """
    token = _GIVEN.set(table)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def goals() -> dict[str, Goal]:
    """Return the goal of each figure, by name or pattern (``*``)."""
    if (given := _GIVEN.get()) is not None:
        return dict(given)
    found = dict(OTHER_GOALS)
    for name, record in METRICS.items():
        found |= record.goals(name)
    return found


def goal_of(name: str) -> Goal | None:
    """Return which way a figure is better, or None if neither way is (a cost, a rate, a count)."""
    given = _GIVEN.get()
    return _goal_of(name, tuple(METRICS if given is None else given.items()))


@cache
def _goal_of(name: str, _known: tuple[Any, ...]) -> Goal | None:
    return next((goal for pattern, goal in goals().items() if fnmatchcase(name, pattern)), None)


def is_better(metric: str, value: float, than: float | None) -> bool:
    """Return whether a figure is strictly better than another one, or than none. NaN and infinity never are.

    Raises:
        ValueError: if the figure has no goal.
    """
    goal = goal_of(metric)
    if goal is None:
        raise ValueError(f"{metric}: not a figure that is better one way; expected one of {', '.join(goals())}")
    if not math.isfinite(value):
        return False
    if than is None:
        return True
    return value < than if goal == "minimize" else value > than


def best_first(items: Iterable[T], metric: str | None, figures_of: Callable[[T], Mapping[str, float]]) -> list[T]:
    """Return items by a figure, best first; then those whose figure is NaN or infinite, then those without it."""
    items = list(items)
    if metric is None:
        return items
    maximize = goal_of(metric) == "maximize"
    return sorted(items, key=lambda item: place(figures_of(item).get(metric), maximize))


def place(value: float | None, maximize: bool) -> tuple[int, float]:
    """Return what sorts values best first: then NaN and infinite ones, then None."""
    if value is None:
        return 2, 0.0
    if not math.isfinite(value):
        return 1, 0.0
    return 0, -value if maximize else value


def count_name(count: int | None) -> str:
    """Return a number of images as names contain it: ``50k``, ``2048``; empty if it is unknown."""
    if count is None:
        return ""
    return f"{count // 1000}k" if count and count % 1000 == 0 else str(count)


def space_name(text: str) -> str:
    """Return a file's name as the name of a feature space: letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "features"


def space_figure(
    part: Part, space: str, count: int | None, reference: str | None, reference_count: int | None = None
) -> str:
    """Return the name of a figure in a feature space: ``eval/fid50k_train``, ``eval/fd_classifier-digits_500_train``.

    Args:
        part: the number.
        space: name of the feature space.
        count: generated images; None if a file of statistics does not say.
        reference: the real images; None for a figure without reference, such as a score.
        reference_count: number of real images, or None if unknown.
    """
    known = [number for number in (count, reference_count) if number is not None]
    if space == INCEPTION and part.inception and min(known, default=0) >= part.inception_from:
        return "_".join(text for text in (f"eval/{part.inception}{count_name(count)}", reference) if text)
    return "_".join(text for text in (f"eval/{part.name}", space, count_name(count), reference) if text)
