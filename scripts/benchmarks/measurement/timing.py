"""Timing alternatives side by side: in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], object]


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Work) -> float:
    """Seconds that one call takes, the GPU's work included."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def alternating(works: Mapping[str, Work], rounds: int, progress: Callable[[str], None] = print) -> dict[str, float]:
    """The median seconds of each alternative, after one call of each that is not counted.

    Args:
        works: the alternatives by name.
        rounds: calls of each.
        progress: told what is being timed.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 1):
        for name, work in works.items():
            taken = timed(work)
            if index:
                times[name].append(taken)
            progress(f"{'round ' + str(index) if index else 'warm-up'} of {rounds}: {name} {taken:.4g} s")
    return {name: statistics.median(values) for name, values in times.items()}
