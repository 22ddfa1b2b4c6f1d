"""Sweeps on W&B: create one, find one, list its runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from agent.tracking.environment import DEFAULT_PROJECT
from diffusion_core.config import ConfigError
from diffusion_core.messages import one_line


@contextmanager
def wandb_errors(what: str) -> Iterator[None]:
    """W&B's errors as one line for the user."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        yield
    except (wandb.errors.Error, WandbApiFailedError, ValueError, OSError) as error:
        raise ConfigError(f"{what}: {one_line(error)}") from None


def flat_summary(summary: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a run's summary; W&B nests those with a goal, as in ``{"val/loss": {"min": 0.1}}``."""
    flat: dict[str, float] = {}
    for key, value in summary.items():
        nested = getattr(value, "items", None)
        if nested is not None:
            value = next((number for kind, number in nested() if kind in ("min", "max")), None)
        if isinstance(value, int | float):
            flat[key] = value
    return flat


@dataclass(frozen=True)
class SweepRun:
    """A trial of a sweep as the server has it.

    Attributes:
        id: the run's id.
        state: W&B's word for it.
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
    """Create a sweep on W&B; returns its path, ``ENTITY/PROJECT/ID``.

    Raises:
        ConfigError: if W&B refuses, or cannot be reached.
    """
    import wandb

    project = config.get("project") or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT
    entity = config.get("entity") or os.environ.get("WANDB_ENTITY")
    with wandb_errors(f"cannot create sweep {config['name']!r}"):
        sweep_id = wandb.sweep(dict(config), entity=entity, project=project)
        return f"{entity or wandb.Api().default_entity}/{project}/{sweep_id}"


def find(name: str) -> tuple[str, dict[str, Any]]:
    """The path and the configuration of a sweep on W&B.

    Args:
        name: ``ENTITY/PROJECT/ID``, ``PROJECT/ID`` or ``ID``.

    Raises:
        ConfigError: if there is none, or W&B cannot be reached.
    """
    import wandb

    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise ConfigError(f"--attach = {name!r}: expected ENTITY/PROJECT/ID, PROJECT/ID or ID")
    with wandb_errors(f"--attach = {name!r}"):
        if len(parts) == 1:
            parts.insert(0, os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT)
        if len(parts) == 2:
            parts.insert(0, os.environ.get("WANDB_ENTITY") or str(wandb.Api().default_entity))
        path = "/".join(parts)
        return path, dict(wandb.Api().sweep(path).config)


def address(path: str) -> str:
    """The web address of a sweep, ``ENTITY/PROJECT/ID``.

    Raises:
        ConfigError: if there is none, or W&B cannot be reached.
    """
    import wandb

    with wandb_errors(path):
        return str(wandb.Api().sweep(path).url)


def runs(path: str) -> list[SweepRun]:
    """The trials of a sweep.

    Raises:
        ConfigError: if there is none, or W&B cannot be reached.
    """
    import wandb

    with wandb_errors(path):
        return [
            SweepRun(
                id=run.id,
                state=run.state,
                config=run.config,
                figures=flat_summary(dict(run.summary)),
                seconds=run.summary.get("_runtime"),
            )
            for run in wandb.Api().sweep(path).runs
        ]


def agent_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for ``wandb agent``: an agent ends the service behind its client with every trial, so it must
    not be this process's.
    """
    import wandb

    return {name: value for name, value in environment.items() if name != wandb.env.SERVICE}
