"""Time alternatives in turns, so that other load on the machine affects all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], object]


def synchronize() -> None:
    """Wait until the GPU is idle, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Work) -> float:
    """Return the seconds of one call, including its work on the GPU."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def alternating(works: Mapping[str, Work], rounds: int, progress: Callable[[str], None] = print) -> dict[str, float]:
    """Return the median seconds of each alternative, after one uncounted call of each.

    Args:
        works: the alternatives, by name.
        rounds: number of calls of each.
        progress: receives a line per call.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 1):
        for name, work in works.items():
            taken = timed(work)
            if index:
                times[name].append(taken)
            progress(f"{'round ' + str(index) if index else 'warm-up'} of {rounds}: {name} {taken:.4g} s")
    return {name: statistics.median(values) for name, values in times.items()}
