"""What a sweep file may say but hardly means. It is printed once, before the sweep starts."""

from __future__ import annotations

import math
from collections.abc import Iterator

from agent.config import TrialConfig
from agent.sweep.file import EXPONENTS, SweepFile
from diffusion_core.config import is_fraction, list_knobs
from diffusion_core.messages import shortened
from diffusion_core.search import engine
from diffusion_core.search.space import choices, flat_parameters, is_whole, values_to_try
from pruning.estimate import times_logged

MANY_TRIALS = 1000
"""A larger grid may be a mistake."""
MUCH = 0.1
"""Share of trials that repeat others. A smaller one is no waste."""
DECIDE_LENGTH = ("preset", "train", "eval", "log", "prune")
"""Parameters that decide how often a trial logs its metric."""


def advice(sweep: SweepFile, trials: int | None, *, offline: bool) -> Iterator[str]:
    """Yield one line for each thing that is probably not meant.

    Args:
        sweep: the sweep.
        trials: number of trials to run; None if the search has no end.
        offline: whether it runs without a server.
    """
    fields = dict(list_knobs(TrialConfig))
    for key, given in flat_parameters(sweep.config["parameters"]).items():
        spec, shown = sweep.parameters[key], f"{key} = {shortened(given)}"
        low, *_, high = values_to_try(spec) if "min" in spec else (0, 0)
        if spec != given:
            yield f"{shown}: numbers without a point, such as 1e-5, are text in YAML, and here numbers; write 1.0e-5"
        if spec.get("distribution") in EXPONENTS:
            yield f"{shown}: exponents of e, so from {low:.3g} to {high:.3g}; log_uniform_values takes the values"
        if "min" in spec and "distribution" not in spec and is_whole(spec) and is_fraction(fields[key]):
            yield f"{shown}: draws only whole numbers; write {low}.0 and {high}.0, or distribution: int_uniform"
    if trials is not None and trials > MANY_TRIALS:
        yield f"{trials:,} trials; --count N or run_cap: N runs fewer"
    yield from _repeated(sweep, trials)
    yield from _idle_hyperband(sweep)
    if offline and sweep.config.get("early_terminate", {}).get("strict"):
        yield "early_terminate.strict = True: W&B's server knows it; offline, trials are stopped as without it"


def _repeated(sweep: SweepFile, trials: int | None) -> Iterator[str]:
    """Advise if a search draws combinations of parameters again."""
    method, space = sweep.config["method"], math.prod(map(choices, sweep.parameters.values()))
    if method == "grid" or math.isinf(space):
        return
    different = space if trials is None else space * -math.expm1(trials * math.log1p(-1 / space)) if space > 1 else 1
    if trials is None or trials - different >= max(1, MUCH * trials):
        count = "trials without end" if trials is None else f"of {trials:,} trials about {different:.0f} differ"
        yield f"method = {method}: {count}, of {space:,.0f} combinations; method: grid tries each once"


def _idle_hyperband(sweep: SweepFile) -> Iterator[str]:
    """Advise if no trial logs the metric often enough to be judged."""
    early, metric = sweep.config.get("early_terminate"), sweep.metric
    if early is None or metric is None:
        return
    band = min(engine.bands(early))
    most = max((times_logged(trial, trial.prune, metric) for _, trial in sweep.trials(*DECIDE_LENGTH)), default=band)
    if most < band + 1:
        yield (
            f"early_terminate = {shortened(early)}: stops no trial: it compares those with more than {band} values of "
            f"{metric}, and a trial logs at most {most:.0f}; lower it, or log more often"
        )
