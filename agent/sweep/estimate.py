"""Estimate what a sweep will cost before it starts: disk, uploads and time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from agent.sweep.file import SweepFile
from diffusion_core.files import free_bytes
from diffusion_core.machine.jobs import JobSize
from diffusion_core.messages import duration, size_in_words
from diffusion_core.search.results import parameters_line
from diffusion_core.search.sweep import first_trials
from pruning.estimate import Estimator, TrialEstimate

SAMPLED_TRIALS = 10
"""Number of trials to estimate. The mean stands for all."""


def estimate_trial(sweep: SweepFile, estimator: Estimator, parameters: dict[str, Any]) -> TrialEstimate:
    """Estimate the trial of some parameters."""
    config = sweep.trial(parameters)
    return estimator.trial(config, config.prune)


def describe_sweep(
    sweep: SweepFile,
    estimator: Estimator,
    *,
    jobs: int,
    trials: int | None,
    folder: Path | None = None,
    size: JobSize | None = None,
) -> str:
    """Return one line on what a sweep will cost, and a second one if the disk has less free space.

    Args:
        sweep: the sweep.
        estimator: estimates its trials.
        jobs: trials at once.
        trials: number of trials to run; None if the search has no end.
        folder: where they go, if on this disk.
        size: what a trial takes of a machine.
    """
    found = [estimate_trial(sweep, estimator, parameters) for parameters in islice(first_trials(sweep), SAMPLED_TRIALS)]
    disk = statistics.mean(trial.disk_bytes for trial in found)
    upload = statistics.mean(trial.upload_bytes for trial in found)
    times = [trial.seconds for trial in found if trial.seconds is not None]
    each_s = statistics.mean(times) if times else None
    device = next((trial.device for trial in found if trial.device), None)
    measured = next((f" (measured: {trial.measured})" for trial in found if trial.measured), "")

    def amount(words: Callable[[float], str], each: float, what: str, at_once: int = 1) -> str:
        whole = f", {words(each * math.ceil(trials / at_once))} in all" if trials is not None else ""
        return f"{words(each)} {what}a trial{whole}"

    said = [
        f"{trials:,} trials, {jobs} at a time" if trials is not None else "trials without end (no run_cap, no --count)",
        amount(size_in_words, disk, "of checkpoints "),
        *([amount(size_in_words, upload, "of uploads ")] if upload else []),
        "time unknown until a trial has ended"
        if each_s is None
        else amount(duration, each_s, "", at_once=jobs) + measured,
        *([] if size is None or each_s is None else [size.hours(each_s, trials, device)]),
    ]
    least = " at most" if "early_terminate" in sweep.config else ""
    lines = [f"estimate{least}: {'; '.join(said)}"]
    if folder is not None and trials is not None:
        free = free_bytes(folder)
        if disk * trials > free:
            lines.append(f"warning: that is more than the {size_in_words(free)} that are free at {str(folder)!r}")
    return "\n".join(lines)


def list_trials(sweep: SweepFile, estimator: Estimator, count: int) -> str:
    """Return the first trials and what each will cost, two lines per trial."""
    lines = []
    for number, parameters in enumerate(islice(first_trials(sweep), count), start=1):
        estimate = estimate_trial(sweep, estimator, parameters)
        seconds = "time unknown" if estimate.seconds is None else f"about {duration(estimate.seconds)}"
        lines.append(f"[{number}] {parameters_line(parameters, sweep.varied)}")
        lines.append(
            f"    {estimate.params:,} parameters, {size_in_words(estimate.disk_bytes)} of checkpoints, {seconds}"
        )
    return "\n".join(lines)
