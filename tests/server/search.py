"""W&B's own search engine, PyPI `sweeps`: the next trial, and which trials hyperband ends.

The engine is the one that W&B runs server-side, so a sweep here is searched as it will be searched there. It is loaded
under another name, because a repository that keeps its sweep files in `sweeps/` may shadow it.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

from .filters import flatten, flatten_summary
from .graphql import Json
from .store import Run, Sweep

_ALIAS = "_wandb_search_engine"


@lru_cache(maxsize=1)
def _engine() -> ModuleType:
    init = Path(str(distribution("sweeps").locate_file("sweeps/__init__.py")))
    spec = importlib.util.spec_from_file_location(_ALIAS, init, submodule_search_locations=[str(init.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_ALIAS] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


ADVICE = "min/max specify base-e exponents"
"""What the schema says of some distributions. The server takes them, and passes the words on."""


def violations(config: Json) -> list[str]:
    """What is wrong with a sweep config."""
    found = [reason for reason in _schema_violations(config) if ADVICE not in reason]
    if "metric" not in config and (config.get("method") == "bayes" or "early_terminate" in config):
        found.append("bayes and early_terminate require a metric")
    return found


def warnings_about(config: Json) -> list[str]:
    """What the server only warns of in a sweep config."""
    return [reason for reason in _schema_violations(config) if ADVICE in reason]


def _schema_violations(config: Json) -> list[str]:
    return list(_engine().schema_violations_from_proposed_config(_searchable(config)))


def suggest(sweep: Sweep) -> Json | None:
    """The parameters of the next trial as `{name: {"value": ...}}`; None where the search is at its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = _engine().next_run(_searchable(sweep.config), _engine_runs(sweep))
    return None if run is None else _plain(run.config)


def to_stop(sweep: Sweep) -> list[str]:
    """The ids of the running trials that early termination ends."""
    if "early_terminate" not in sweep.config:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stopped = _engine().stop_runs(_searchable(sweep.config), _engine_runs(sweep))
    return [run.name for run in stopped]


def expected_runs(config: Json) -> int | None:
    """How many trials the sweep can have: the size of a grid, or its cap."""
    cap = config.get("run_cap")
    if config.get("method") != "grid":
        return cap
    size = _grid_size(config.get("parameters", {}))
    return size if cap is None else min(cap, size)


def _grid_size(parameters: Json) -> int:
    size = 1
    for parameter in parameters.values():
        if "parameters" in parameter:
            size *= _grid_size(parameter["parameters"])
        elif "values" in parameter:
            size *= len(parameter["values"])
    return size


def _searchable(config: Json) -> Json:
    # The engine's schema is older than these keys, and than early_terminate.strict.
    newer = ("run_cap", "metrics", "scheduler")
    searchable = {key: value for key, value in config.items() if key not in newer}
    if "early_terminate" in config:
        early = {key: value for key, value in config["early_terminate"].items() if key != "strict"}
        searchable["early_terminate"] = early
    return searchable


def _engine_runs(sweep: Sweep) -> list[Any]:
    goal = sweep.config.get("metric", {}).get("goal", "minimize")
    return [_engine_run(run, goal, sweep) for run in [*sweep.prior_runs, *sweep.runs]]


def _engine_run(run: Run, goal: str, sweep: Sweep) -> Any:
    """Only the aliases of the two metric fields reach the model: it ignores the field names in silence."""
    parameters = run.suggested
    if parameters is None:
        names = sweep.config.get("parameters", {})
        parameters = {name: {"value": value} for name, value in run.config.items() if name in names}
    return _engine().SweepRun(
        name=run.id,
        state=run.state,
        config=parameters,
        summaryMetrics=flatten_summary(run.summary, goal),
        sampledHistory=[{**flatten(row), **row} for row in run.history],
    )


def _plain(value: Any) -> Any:
    """Without numpy scalars, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.item() if hasattr(value, "item") else value
