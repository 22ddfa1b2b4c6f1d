"""Note in the folder of an agent's job which trial it runs, so that the trial of a killed job can be handed back.

A trial notes its run before all slow imports, and its folder once it has one. Imports nothing slow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusion_core.files import write_json

FOLDER = "DIFFUSION_SWEEPS_JOB_FOLDER"
"""Environment variable of a job's command: the job's folder."""

TRIAL_FILE = "trial.json"
"""File in the folder of an agent's job: its trial, until W&B was told how that ended."""

RUN = "WANDB_RUN_ID"
NAMES_RUN = (RUN, "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_ENTITY", "WANDB_PROJECT")
"""Variables with which W&B's agent says which run its command is, and the file of what the sweep chose for it."""


@dataclass(frozen=True)
class Assigned:
    """The trial of an agent.

    Attributes:
        environment: what names its run on W&B.
        folder: the trial's folder; empty: it has none yet.
    """

    environment: Mapping[str, str]
    folder: str = ""


def note_run() -> None:
    """Note the run of this process. Nothing outside the job of an agent."""
    if RUN in os.environ and "WANDB_SWEEP_ID" in os.environ:
        note_trial("")


def note_trial(folder: Path | str | None) -> None:
    """Note the trial's folder. Nothing outside a job.

    Args:
        folder: the folder; empty: it has none yet; None: the trial has ended, and W&B knows how.
    """
    named = os.environ.get(FOLDER)
    if not named:
        return
    if folder is None:
        (Path(named) / TRIAL_FILE).unlink(missing_ok=True)
    else:
        environment = {name: os.environ[name] for name in NAMES_RUN if name in os.environ}
        trial = Assigned(environment, str(Path(folder).absolute()) if folder else "")
        write_json(Path(named) / TRIAL_FILE, asdict(trial))


def assigned(job_folder: Path) -> Assigned | None:
    """Return the trial that is noted in a job's folder; None if there is none. Older versions noted only its folder."""
    try:
        content = json.loads((job_folder / TRIAL_FILE).read_text(encoding="utf-8"))
        return Assigned({}, content) if isinstance(content, str) else Assigned(**content)
    except (OSError, ValueError, TypeError):
        return None
