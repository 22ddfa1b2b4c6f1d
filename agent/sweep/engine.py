"""W&B's search engine, the PyPI package ``sweeps``: what suggests trials and gives up on bad ones."""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_core.randomness import stream_seed

SEARCH_SEED = 0


def _engine() -> Any:
    # By name, since type checkers take `import sweeps` for the repository's folder of sweep files; and quietly, since
    # the engine's models, written for pydantic 1, warn on import.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("sweeps")


def violations(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a sweep's configuration, by W&B's own schema."""
    try:
        return list(_engine().schema_violations_from_proposed_config(config))
    except ValueError as error:
        return [str(error)]


def past_run(name: str, parameters: Mapping[str, Any], state: str, summary: Mapping[str, float], history: Any) -> Any:
    """A trial as the engine knows it.

    Args:
        name: the trial's id.
        parameters: what the engine suggested.
        state: ``running``, ``finished`` or ``failed``.
        summary: the best value of each figure.
        history: rows of figures.
    """
    return _engine().SweepRun(
        name=name,
        config={key: {"value": value} for key, value in parameters.items()},
        state=state,
        # By alias: the engine ignores the fields' own names in silence.
        summaryMetrics=dict(summary),
        sampledHistory=history,
    )


def suggest(config: Mapping[str, Any], runs: Sequence[Any]) -> dict[str, Any] | None:
    """The parameters of the next trial, or None when the search is exhausted.

    The n-th suggestion depends on the sweep and the runs before it alone, so that a restarted sweep goes on as the
    unbroken one would have.
    """
    # The engine draws from the global generators.
    seed = stream_seed(SEARCH_SEED, len(runs))
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = _engine().next_run(dict(config), list(runs))
    return None if run is None else {key: plain(entry["value"]) for key, entry in run.config.items()}


def doomed(config: Mapping[str, Any], runs: Sequence[Any]) -> set[str]:
    """Names of the running trials that early termination gives up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {run.name for run in _engine().stop_runs(dict(config), list(runs))}


def plain(value: Any) -> Any:
    """Numpy scalars, which the engine hands out, and nested containers as plain Python."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
