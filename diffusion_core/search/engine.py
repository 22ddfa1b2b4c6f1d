"""W&B's search engine, the PyPI package ``sweeps``: suggests trials and stops bad ones early."""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_core.randomness import stream_seed
from diffusion_core.registries import SEARCHES
from diffusion_core.search.method import SearchMethod
from diffusion_core.search.objectives import Objective

SEARCH_SEED = 0
AT_ONCE = 16
"""Least number of trials of a grid to ask for at once."""

ACCEPTED = "min/max specify base-e exponents"
"""What the schema says of ``log_uniform`` and its like. W&B advises against them, and runs them."""


def _call(name: str, /, *arguments: Any, **options: Any) -> Any:
    """Call a function of the engine without its warnings: its models are written for pydantic 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # By name: type checkers take `import sweeps` for the folder of sweep files.
        return getattr(importlib.import_module("sweeps"), name)(*arguments, **options)


def violations(config: Mapping[str, Any]) -> list[str]:
    """Return what W&B's schema finds wrong in a sweep's configuration."""
    try:
        found = _call("schema_violations_from_proposed_config", config)
    except ValueError as error:
        return [str(error)]
    return [reason for reason in found if ACCEPTED not in reason]


def past_run(name: str, parameters: Mapping[str, Any], state: str, summary: Mapping[str, float], history: Any) -> Any:
    """Return a trial as the engine represents it.

    Args:
        name: the trial's id.
        parameters: what the engine suggested.
        state: ``running``, ``finished`` or ``failed``.
        summary: the best value of each figure of quality, and the last one of every other figure.
        history: rows of figures.
    """
    return _call(
        "SweepRun",
        name=name,
        config={key: {"value": value} for key, value in parameters.items()},
        state=state,
        # By their aliases: the engine silently ignores the fields' own names.
        summaryMetrics=dict(summary),
        sampledHistory=history,
    )


def suggest(config: Mapping[str, Any], runs: Sequence[Any]) -> dict[str, Any] | None:
    """Return the parameters of the next trial, or None when the search is exhausted.

    The n-th suggestion depends only on the sweep and the runs before it, so that a resumed sweep continues as an
    uninterrupted one would.
    """
    # The engine uses the global random generators.
    seed = stream_seed(SEARCH_SEED, len(runs))
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    run = _call("next_run", dict(config), list(runs))
    return None if run is None else _parameters(run)


class Search:
    """Suggests one trial after another, as :func:`suggest` does, in a time that does not grow with their number.

    The engine compares a grid with all runs for each suggestion, and a random search ignores them. Only a Bayesian
    search needs what they have measured; its time grows with their number.

    Args:
        config: for the engine.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._ready: list[dict[str, Any] | None] = []

    def suggest(self, past: Sequence[Mapping[str, Any]], runs: Callable[[], Sequence[Any]]) -> dict[str, Any] | None:
        """Return the parameters of the next trial, or None when the search is exhausted.

        Args:
            past: the parameters of all trials so far, among them each that this object has suggested.
            runs: returns these trials as :func:`past_run` does; called only if the search needs more of them.
        """
        if self.config["method"] == "bayes":
            return suggest(self.config, runs())
        if self.config["method"] == "random":
            return suggest(self.config, [None] * len(past))
        if not self._ready:
            known = [past_run("", parameters, "running", {}, []) for parameters in past]
            # As many again as there are: the engine's time per trial then stays the same.
            found = _call("next_runs", dict(self.config), known, n=max(AT_ONCE, len(past)))
            self._ready = [None if run is None else _parameters(run) for run in found]
        return self._ready.pop(0) if self._ready[0] is not None else None


def _parameters(run: Any) -> dict[str, Any]:
    return {key: plain(entry["value"]) for key, entry in run.config.items()}


def doomed(config: Mapping[str, Any], runs: Sequence[Any]) -> set[str]:
    """Return the names of the running trials that early termination stops."""
    return {run.name for run in _call("stop_runs", dict(config), list(runs))}


def doomed_by_all(config: Mapping[str, Any], objectives: Sequence[Objective], runs: Sequence[Any]) -> set[str]:
    """Return the names of the running trials that early termination stops by each objective that trials log meanwhile.

    A trial that is good in one of them goes on. An objective that is known only at the end, such as ``sample/macs``,
    has no say.
    """
    logged = {name for run in runs for row in run.history for name in row}
    named = [{"name": each.name, "goal": each.goal} for each in objectives if each.name in logged]
    # A single metric may say more than its name and goal. The engine does not know the methods of others.
    found = [doomed({"metric": metric, **config, "method": "random"}, runs) for metric in named]
    return set.intersection(*found) if found else set()


def quantile(key: str, spec: Mapping[str, Any], share: float) -> Any:
    """Return the value of a parameter that a share of its distribution is below.

    Args:
        key: the parameter.
        spec: its range and distribution.
        share: in [0, 1].
    """
    parameter = importlib.import_module("sweeps.params").HyperParameter(key, dict(spec))
    return plain(parameter.ppf(share))


def bands(early_terminate: Mapping[str, Any]) -> list[int]:
    """Return the bands of hyperband: a running trial is judged once it has logged the metric more often than a band.

    Raises:
        ValueError: if the engine cannot use these settings.
    """
    run = past_run("trial", {}, "running", {}, [])
    config = {"method": "random", "metric": {"name": "x"}, "early_terminate": dict(early_terminate), "parameters": {}}
    try:
        doomed(config, [run])
    except (KeyError, TypeError) as error:
        raise ValueError(error) from None
    return list(run.early_terminate_info["bands"])


def plain(value: Any) -> Any:
    """Convert numpy scalars, which the engine returns, and nested containers to plain Python."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


for _name, _help, _learns in (
    ("grid", "every combination of the values, in order", False),
    ("random", "draws each parameter by itself", False),
    ("bayes", "a Gaussian process of one metric", True),
):
    SEARCHES[_name] = SearchMethod(
        lambda request: Search(request.config), f"{_help} (W&B's engine)", learns=_learns, on_server=True
    )
