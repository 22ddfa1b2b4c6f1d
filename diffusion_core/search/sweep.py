"""A sweep as data: its content in W&B's format, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from diffusion_core.config import ConfigError
from diffusion_core.config.metrics import COSTS
from diffusion_core.messages import shortened
from diffusion_core.registries import SEARCHES
from diffusion_core.search import engine
from diffusion_core.search.macros import TrialCommand
from diffusion_core.search.method import Search, SearchMethod, SearchRequest
from diffusion_core.search.objectives import Objective, objectives_of
from diffusion_core.search.space import grid_size

MAX_NAME_BYTES = 200
"""Length of a sweep's name. A folder's name may have 255 bytes."""


class SweepError(ConfigError):
    """A sweep that cannot be run. The message has one line per problem."""


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        name: the sweep's name, or the file's.
        config: the file's content, in W&B's format.
        parameters: the parameters, flat, by dotted key.
        command: what a trial reads besides them.
    """

    name: str
    config: dict[str, Any]
    parameters: dict[str, dict[str, Any]]
    command: TrialCommand

    @property
    def metric(self) -> str | None:
        """Name of the metric; of several objectives, the first that is a figure of quality; None if there is none."""
        return next((each.name for each in self.objectives if each.name not in COSTS), None)

    @property
    def objectives(self) -> list[Objective]:
        """The figures that trials are judged by: one of ``metric:``, several of ``metrics:``, or none."""
        return objectives_of(self.config)

    @property
    def several(self) -> bool:
        """Whether trials are judged by several figures, so that there is no best trial, but a Pareto front."""
        return len(self.objectives) > 1

    @property
    def maximize(self) -> bool:
        """Whether larger values of the metric are better."""
        return next((each.goal for each in self.objectives if each.name == self.metric), None) == "maximize"

    @property
    def target(self) -> float | None:
        """Value of the metric at which no further trials begin, or None."""
        return self.config.get("metric", {}).get("target")

    @property
    def varied(self) -> list[str]:
        """The parameters that differ between trials."""
        return [
            key for key, spec in self.parameters.items() if len(spec.get("values", (0, 1))) > 1 and "value" not in spec
        ]

    @property
    def run_cap(self) -> int | None:
        """Largest number of trials, or None."""
        return self.config.get("run_cap")

    def grid_size(self) -> int | None:
        """Return the number of trials of a grid; None for other methods."""
        return grid_size(self.parameters) if self.config["method"] == "grid" else None

    @cached_property
    def total(self) -> int | None:
        """Number of trials; None if the search has no end."""
        return min((cap for cap in (self.run_cap, self.grid_size()) if cap is not None), default=None)

    def renamed(self, name: str) -> Self:
        """Return the same sweep with another name.

        Raises:
            SweepError: if a folder cannot have that name.
        """
        if problems := name_problems(name):
            raise SweepError(*problems)
        return replace(self, name=name, config=self.config | {"name": name})

    def engine_config(self) -> dict[str, Any]:
        """Return the configuration for W&B's search engine: parameters flat, and no settings of the server."""
        known = ("method", "metric", "early_terminate")
        return {key: self.config[key] for key in known if key in self.config} | {"parameters": self.parameters}

    def check_on_server(self) -> None:
        """Check that W&B's server can run this sweep.

        Raises:
            SweepError: if it does not know the search method, or several objectives.
        """
        method: SearchMethod = SEARCHES[self.config["method"]]
        if self.several or not method.on_server:
            what = "metrics" if self.several else f"method = {self.config['method']!r}"
            raise SweepError(f"{what}: not known to W&B's server; add --offline")

    def search(self, folder: Path | None = None) -> Search:
        """Return the search of this sweep.

        Args:
            folder: the sweep's folder, where the search may keep its state; None: it is asked only for a preview.
        """
        method: SearchMethod = SEARCHES[self.config["method"]]
        return method.make(SearchRequest(self.engine_config(), self.objectives, folder, self.total))


def first_trials(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yield the parameters that the search engine suggests first, before any trial has ended."""
    search = sweep.search()
    past: list[dict[str, Any]] = []
    runs: list[Any] = []
    while sweep.total is None or len(runs) < sweep.total:
        parameters = search.suggest(past, lambda: runs)
        if parameters is None:
            return
        yield parameters
        past.append(parameters)
        runs.append(engine.past_run(str(len(runs)), parameters, "running", {}, []))


def name_problems(name: str) -> list[str]:
    """Return what is wrong with a sweep's name: its folder has that name too."""
    if name and Path(name).name == name and name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES:
        return []
    return [f"name = {shortened(name)}: expected a name that a folder can have"]
