"""What a sweep file may say but hardly means. It is printed once, before the sweep starts."""

from __future__ import annotations

from collections.abc import Iterator

from agent.config import TrialConfig
from agent.sweep.file import SweepFile
from diffusion_core.config import list_knobs
from diffusion_core.search.advice import idle_hyperband, many_or_repeated, odd_numbers, other_best
from pruning.estimate import times_logged

DECIDE_LENGTH = ("preset", "train", "eval", "log", "prune")
"""Parameters that decide how often a trial logs its metric."""


def advice(sweep: SweepFile, trials: int | None, *, offline: bool) -> Iterator[str]:
    """Yield one line for each thing that is probably not meant.

    Args:
        sweep: the sweep.
        trials: number of trials to run; None if the search has no end.
        offline: whether it runs without a server.
    """
    yield from odd_numbers(sweep, dict(list_knobs(TrialConfig)))
    yield from many_or_repeated(sweep, trials)
    yield from other_best(sweep, {trial.checkpoint.best_metric for _, trial in sweep.trials("preset", "checkpoint")})
    metric = sweep.metric
    if "early_terminate" in sweep.config and metric is not None:
        logged = [times_logged(trial, trial.prune, metric) for _, trial in sweep.trials(*DECIDE_LENGTH)]
        yield from idle_hyperband(sweep, max(logged)) if logged else ()
    if offline and sweep.config.get("early_terminate", {}).get("strict"):
        yield "early_terminate.strict = True: W&B's server knows it; offline, trials are stopped as without it"
