"""Turn what W&B holds of a run or a sweep into a study. Takes plain values: asking W&B is left to the caller."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffusion_core.data.fingerprint import RECORDED
from diffusion_core.report.folders import COST_FIGURES, metric_of, searched_settings, with_parents
from diffusion_core.report.study import SECONDS, SWEEP, Study, Trial
from diffusion_core.runs.inputs import inputs_of
from diffusion_core.tracking import BEST, STEP

PROTOCOL = "protocol/"
DATA = "data/"
LINK = "on W&B"


def uploaded_trial(
    name: str,
    state: str,
    *,
    project: str,
    url: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    model: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
) -> Trial:
    """Return a run as a trial. Its figures are those of its best model, if it has one, as on the leaderboard.

    Args:
        name: the run's id.
        state: W&B's name for its state.
        project: ``ENTITY/PROJECT``.
        url: its web address.
        config: every knob, by dotted key.
        summary: plain values by name.
        model: metadata of its best model; empty if there is none.
        rows: its history.
    """
    figures = {
        key: value
        for key, value in summary.items()
        if isinstance(value, int | float) and key[0] != "_" and not key.startswith(f"{BEST}/")
    }
    if "figures" in model:
        costs = {key: value for key, value in figures.items() if key.startswith(COST_FIGURES)}
        figures = costs | dict(model["figures"])
    if isinstance(seconds := summary.get("_runtime"), int | float):
        figures[SECONDS] = float(seconds)
    protocols = {key.removeprefix(PROTOCOL): str(line) for key, line in summary.items() if key.startswith(PROTOCOL)}
    history = [
        {key: value for key, value in row.items() if isinstance(value, int | float) and key[0] != "_"}
        | {STEP: row.get(STEP, row.get("_step", 0))}
        for row in rows
    ]
    artifact = shlex.quote(f"{project}/model-{name}")
    return Trial(
        name,
        state,
        dict(config),
        figures,
        protocols | dict(model.get("protocols", {})),
        model.get("step"),
        history,
        parent=str(config.get("init.artifact") or "") or None,
        inputs=inputs_of({"config": config, RECORDED: _images(summary), "extra": model}),
        links={LINK: url},
        sample=f"python scripts/sample_images.py --artifact {artifact} --out samples" if model else "",
    )


def _images(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's summary says of its images, as its checkpoints record it."""
    return {key.removeprefix(DATA): value for key, value in summary.items() if key.startswith(DATA)}


def uploaded_sweep(name: str, config: Mapping[str, Any], url: str, trials: Sequence[Trial]) -> Study:
    """Return the study of a sweep on W&B from its configuration and its trials.

    The command that trains a trial again passes it the sweep's parameters.
    """
    searched, keys = searched_settings(config["parameters"])
    again = [_with_command(trial, [key for key in keys if key in trial.settings]) for trial in trials]
    return Study(
        str(config.get("name") or name),
        with_parents(again),
        SWEEP,
        f"{config.get('method', '')} search",
        searched,
        **metric_of(config),
        varied=list(searched),
        running=any(trial.state == "running" for trial in trials),
        links={LINK: url},
    )


def _with_command(trial: Trial, keys: Sequence[str]) -> Trial:
    def word(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    words = [f"--{key}={word(trial.settings[key])}" for key in keys]
    return replace(trial, reproduce=shlex.join(["python", "-m", "agent", *words]))
