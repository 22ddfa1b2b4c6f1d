"""Sweeps on W&B: create one, find one, list its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.tracking.api import api_errors, client, entity_name, failures, project_name
from agent.tracking.project import best_model
from diffusion_core.config import ConfigError
from diffusion_core.report.study import Study, Trial
from diffusion_core.report.uploaded import LINK, uploaded_sweep, uploaded_trial
from diffusion_core.runs.recorded import flat_summary, summary_figures

HISTORY_ROWS = 200
"""Rows of a run's history that are asked for, evenly spaced."""


@dataclass(frozen=True)
class SweepRun:
    """A trial of a sweep on the server.

    Attributes:
        id: the run's id.
        state: W&B's name for its state.
        config: every knob, by dotted key.
        figures: the numbers in its summary.
        seconds: wall time, or None.
    """

    id: str
    state: str
    config: Mapping[str, Any]
    figures: dict[str, float]
    seconds: float | None


def create(config: Mapping[str, Any]) -> str:
    """Create a sweep on W&B. Return its path, ``ENTITY/PROJECT/ID``.

    Raises:
        ConfigError: if W&B refuses, or cannot be reached.
    """
    import wandb

    project = config.get("project") or project_name()
    with api_errors(f"cannot create sweep {config['name']!r}"):
        entity = config.get("entity") or entity_name()
        sweep_id = wandb.sweep(dict(config), entity=entity, project=project)
        return f"{entity}/{project}/{sweep_id}"


def find(name: str) -> tuple[str, dict[str, Any]]:
    """Return the path and the configuration of a sweep on W&B.

    Args:
        name: ``ENTITY/PROJECT/ID``, ``PROJECT/ID`` or ``ID``.

    Raises:
        ConfigError: if the sweep does not exist, or W&B cannot be reached.
    """
    option, parts = f"--attach = {name!r}", name.split("/")
    if not all(parts) or len(parts) > 3:
        raise ConfigError(f"{option}: expected ENTITY/PROJECT/ID, PROJECT/ID or ID")
    with api_errors(option):
        if len(parts) == 1:
            parts.insert(0, project_name())
        if len(parts) == 2:
            parts.insert(0, str(entity_name()))
        path = "/".join(parts)
        return path, dict(client().sweep(path).config)


def address(path: str) -> str:
    """Return the web address of a sweep, ``ENTITY/PROJECT/ID``.

    Raises:
        ConfigError: if the sweep does not exist, or W&B cannot be reached.
    """
    with api_errors(path):
        return str(client().sweep(path).url)


def runs(path: str) -> list[SweepRun]:
    """Return the trials of a sweep.

    Raises:
        ConfigError: if the sweep does not exist, or W&B cannot be reached.
    """
    with api_errors(path):
        return [
            SweepRun(run.id, run.state, run.config, summary_figures(run.summary), run.summary.get("_runtime"))
            for run in client().sweep(path).runs
        ]


def study(path: str) -> Study:
    """Return the trials of a sweep, or a single run, ``ENTITY/PROJECT/ID``, without pictures.

    Raises:
        ConfigError: if there is neither, or W&B cannot be reached.
    """
    with api_errors(f"{path!r}: no such folder, and no sweep or run on W&B"):
        api = client()
        try:
            sweep = api.sweep(path)
        except failures():
            run = api.run(path)
            return Study(str(run.name), [_trial(run)], running=run.state == "running", links={LINK: run.url})
        return uploaded_sweep(sweep.id, sweep.config, sweep.url, [_trial(run) for run in sweep.runs])


def _trial(run: Any) -> Trial:
    return uploaded_trial(
        run.id,
        run.state,
        project=f"{run.entity}/{run.project}",  # run.path is quoted for web addresses.
        url=run.url,
        config=run.config,
        summary=flat_summary(run.summary),
        model=best_model(run),
        rows=run.history(samples=HISTORY_ROWS, pandas=False),
    )


def agent_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for ``wandb agent``: without this process's W&B service, which an agent would stop."""
    import wandb

    return {name: value for name, value in environment.items() if name != wandb.env.SERVICE}
