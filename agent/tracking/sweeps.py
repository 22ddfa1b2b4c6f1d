"""Sweeps on W&B: create one, find one, list its runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.tracking.api import api_errors, entity_name, project_name, summary_figures
from diffusion_core.config import ConfigError


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
    entity = config.get("entity") or os.environ.get("WANDB_ENTITY")
    with api_errors(f"cannot create sweep {config['name']!r}"):
        sweep_id = wandb.sweep(dict(config), entity=entity, project=project)
        return f"{entity or wandb.Api().default_entity}/{project}/{sweep_id}"


def find(name: str) -> tuple[str, dict[str, Any]]:
    """Return the path and the configuration of a sweep on W&B.

    Args:
        name: ``ENTITY/PROJECT/ID``, ``PROJECT/ID`` or ``ID``.

    Raises:
        ConfigError: if the sweep does not exist, or W&B cannot be reached.
    """
    import wandb

    option, parts = f"--attach = {name!r}", name.split("/")
    if not all(parts) or len(parts) > 3:
        raise ConfigError(f"{option}: expected ENTITY/PROJECT/ID, PROJECT/ID or ID")
    with api_errors(option):
        if len(parts) == 1:
            parts.insert(0, project_name())
        if len(parts) == 2:
            parts.insert(0, str(entity_name()))
        path = "/".join(parts)
        return path, dict(wandb.Api().sweep(path).config)


def address(path: str) -> str:
    """Return the web address of a sweep, ``ENTITY/PROJECT/ID``.

    Raises:
        ConfigError: if the sweep does not exist, or W&B cannot be reached.
    """
    import wandb

    with api_errors(path):
        return str(wandb.Api().sweep(path).url)


def runs(path: str) -> list[SweepRun]:
    """Return the trials of a sweep.

    Raises:
        ConfigError: if the sweep does not exist, or W&B cannot be reached.
    """
    import wandb

    with api_errors(path):
        return [
            SweepRun(run.id, run.state, run.config, summary_figures(run.summary), run.summary.get("_runtime"))
            for run in wandb.Api().sweep(path).runs
        ]


def agent_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for ``wandb agent``: without this process's W&B service, which an agent would stop."""
    import wandb

    return {name: value for name, value in environment.items() if name != wandb.env.SERVICE}
