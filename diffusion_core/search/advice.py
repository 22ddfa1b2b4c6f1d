"""What a sweep may say but hardly means, as far as its space and its search tell."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from diffusion_core.config import is_fraction
from diffusion_core.config.metrics import COSTS
from diffusion_core.messages import shortened
from diffusion_core.search import engine
from diffusion_core.search.settings import EXPONENTS
from diffusion_core.search.space import choices, flat_parameters, is_whole, values_to_try
from diffusion_core.search.sweep import Sweep
from diffusion_core.tracking import BEST

MANY_TRIALS = 1000
"""A larger grid may be a mistake."""
MUCH = 0.1
"""Share of trials that repeat others. A smaller one is no waste."""


def odd_numbers(sweep: Sweep, knobs: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each parameter whose numbers YAML or W&B reads in an unexpected way.

    Args:
        sweep: the sweep.
        knobs: the field of each knob, by its key.
    """
    for key, given in flat_parameters(sweep.config["parameters"]).items():
        spec, shown = sweep.parameters[key], f"{key} = {shortened(given)}"
        low, *_, high = values_to_try(spec) if "min" in spec else (0, 0)
        if spec != given:
            yield f"{shown}: numbers without a point, such as 1e-5, are text in YAML, and here numbers; write 1.0e-5"
        if spec.get("distribution") in EXPONENTS:
            yield f"{shown}: exponents of e, so from {low:.3g} to {high:.3g}; log_uniform_values takes the values"
        if "min" in spec and "distribution" not in spec and is_whole(spec) and is_fraction(knobs[key]):
            yield f"{shown}: draws only whole numbers; write {low}.0 and {high}.0, or distribution: int_uniform"


def many_or_repeated(sweep: Sweep, trials: int | None) -> Iterator[str]:
    """Yield one line if there are very many trials, and one if the search draws combinations of parameters again.

    Args:
        sweep: the sweep.
        trials: number of trials to run; None if the search has no end.
    """
    if trials is not None and trials > MANY_TRIALS:
        yield f"{trials:,} trials; --count N or run_cap: N runs fewer"
    method, space = sweep.config["method"], math.prod(map(choices, sweep.parameters.values()))
    if method == "grid" or math.isinf(space):
        return
    different = space if trials is None else space * -math.expm1(trials * math.log1p(-1 / space)) if space > 1 else 1
    if trials is None or trials - different >= max(1, MUCH * trials):
        count = "trials without end" if trials is None else f"of {trials:,} trials about {different:.0f} differ"
        yield f"method = {method}: {count}, of {space:,.0f} combinations; method: grid tries each once"


def idle_hyperband(sweep: Sweep, most: float) -> Iterator[str]:
    """Yield one line if early termination cannot stop a trial.

    Args:
        sweep: the sweep.
        most: largest number of times that a trial logs the metric.
    """
    early = sweep.config["early_terminate"]
    band = min(engine.bands(early))
    if most < band + 1:
        yield (
            f"early_terminate = {shortened(early)}: stops no trial: it compares those with more than {band} values of "
            f"{sweep.metric}, and a trial logs at most {most:.0f}; lower it, or log more often"
        )


def other_best(sweep: Sweep, kept_by: Collection[str]) -> Iterator[str]:
    """Yield one line if trials keep their best checkpoint by another figure than the sweep's only metric.

    A loss of training says little of a checkpoint, so nothing is said of it.

    Args:
        sweep: the sweep.
        kept_by: ``checkpoint.best_metric`` of its trials.
    """
    metric = (sweep.metric or "").removeprefix(f"{BEST}/")
    others = sorted(set(kept_by) - {metric})
    measured = metric and metric not in COSTS and not metric.startswith("train/")
    if measured and others and not sweep.several:
        yield (
            f"checkpoint.best_metric = {others[0]!r}: trials are ranked by the best {metric} of the whole run, but the "
            f"checkpoint that commands and reports take may have another; set it to {metric}"
        )
