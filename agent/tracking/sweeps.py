"""Sweeps on W&B: create one, find one, list its runs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.tracking.api import api_errors, entity_name, failures, flat_summary, project_name, summary_figures
from agent.tracking.project import best_model
from diffusion_core.config import ConfigError
from diffusion_core.evaluation.protocol import PREFIX
from diffusion_core.report.folders import searched_settings, with_parents
from diffusion_core.report.study import RUNS, SECONDS, SWEEP, Study, Trial
from diffusion_core.tracking import STEP

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


def study(path: str) -> Study:
    """Return the trials of a sweep, or a single run, ``ENTITY/PROJECT/ID``, without pictures.

    Raises:
        ConfigError: if there is neither, or W&B cannot be reached.
    """
    import wandb

    api = wandb.Api()
    with api_errors(f"{path!r}: neither a sweep nor a run"):
        try:
            found = api.sweep(path)
        except failures():
            run = api.run(path)
            return Study(run.name, [_trial(run, ())], RUNS, running=run.state == "running", links={"on W&B": run.url})
        config = dict(found.config)
        searched, keys = searched_settings(config["parameters"])
        trials = [_trial(run, keys) for run in found.runs]
    return Study(
        str(config.get("name") or found.id),
        with_parents(trials),
        SWEEP,
        f"{config.get('method', '')} search",
        searched,
        (config.get("metric") or {}).get("name"),
        varied=list(searched),
        running=any(trial.state == "running" for trial in trials),
        links={"on W&B": found.url},
    )


def _trial(run: Any, keys: Any) -> Trial:
    """Return a run as a trial. Its figures are those of its best model, if it has one, as on the leaderboard."""
    model, summary = best_model(run), flat_summary(run.summary)
    figures = summary_figures(run.summary)
    if "figures" in model:
        figures = {key: value for key, value in figures.items() if key.startswith(("model/", "prune/"))} | model[
            "figures"
        ]
    if isinstance(seconds := summary.get("_runtime"), int | float):
        figures[SECONDS] = float(seconds)
    rows = [{key: value for key, value in row.items() if isinstance(value, int | float) and key[0] != "_"}
            | {STEP: row.get(STEP, row["_step"])} for row in run.history(samples=HISTORY_ROWS, pandas=False)]  # fmt: skip
    flags = [f"--{key}={value if isinstance(value := run.config.get(key), str) else json.dumps(value)}" for key in keys]
    protocols = {key.removeprefix(PREFIX): str(line) for key, line in summary.items() if key.startswith(PREFIX)}
    return Trial(
        run.id,
        run.state,
        dict(run.config),
        figures,
        protocols | model.get("protocols", {}),
        model.get("step"),
        rows,
        parent=str(run.config.get("init.artifact") or "") or None,
        links={"on W&B": run.url},
        reproduce=shlex.join(["python", "-m", "agent", *flags]) if flags else "",
        sample=f"python scripts/sample_images.py --artifact {'/'.join(run.path[:2])}/model-{run.id} --out samples"
        if model
        else "",
    )


def agent_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for ``wandb agent``: without this process's W&B service, which an agent would stop."""
    import wandb

    return {name: value for name, value in environment.items() if name != wandb.env.SERVICE}
