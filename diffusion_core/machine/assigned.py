"""Know which trial an agent's job was killed in, so that it can be handed back to the sweep.

W&B's agent writes a file of parameters before it starts a trial. The trial notes its folder in that of the job as soon
as it has one, and later that W&B knows how it ended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from diffusion_core.files import write_json

FOLDER = "DIFFUSION_SWEEPS_JOB_FOLDER"
"""Environment variable of a job's command: the job's folder."""

TRIAL_FILE = "trial.json"
"""File in the folder of an agent's job: its last trial."""

PARAMETERS = "wandb/sweep-*/config-*.yaml"
"""Files that W&B's agent writes below WANDB_DIR: the parameters of each run that it was given."""


@dataclass(frozen=True)
class Assigned:
    """The trial of an agent.

    Attributes:
        folder: its folder; empty: it had none yet.
        run: id of its run.
        ended: whether W&B knows how it ended.
        environment: what names its run on W&B, if it has no folder.
    """

    folder: str
    run: str = ""
    ended: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def note_trial(folder: Path | None) -> None:
    """Note the trial of this process. Nothing outside a job.

    Args:
        folder: the trial's folder; None: the trial has ended, and W&B knows how.
    """
    named = os.environ.get(FOLDER)
    if named:
        before = _noted(Path(named))
        run = os.environ.get("WANDB_RUN_ID") or ("" if before is None else before.run)  # A lottery hides the variable.
        trial = Assigned("" if folder is None else str(folder.absolute()), run, folder is None)
        # A trial that ends because the disk is full must not fail of that again.
        with suppress(OSError) if folder is None else nullcontext():
            write_json(Path(named) / TRIAL_FILE, asdict(trial))


def agent_folder(job_folder: Path) -> Path:
    """Return WANDB_DIR of a job's agent: no other agent writes there."""
    own = os.environ.get("WANDB_DIR")
    return Path(own, job_folder.name).absolute() if own else job_folder.absolute()


def assigned(job_folder: Path, place: Sequence[str]) -> Assigned | None:
    """Return the trial that a job's agent was killed in; None if there is none.

    Args:
        job_folder: the job's folder.
        place: entity and project of the sweep.
    """
    note = _noted(job_folder)
    noted_at = 0 if note is None else (job_folder / TRIAL_FILE).stat().st_mtime_ns
    given = {file.stat().st_mtime_ns: file for file in agent_folder(job_folder).glob(PARAMETERS)}
    if given:
        given_at, file = max(given.items())
        run, sweep = file.stem.removeprefix("config-"), file.parent.name.removeprefix("sweep-")
        # Both files are of one job on one node, so their times can be compared.
        if note is None or note.run != run or given_at > noted_at:
            named = {"WANDB_RUN_ID": run, "WANDB_SWEEP_ID": sweep, "WANDB_SWEEP_PARAM_PATH": str(file)}
            named |= dict(zip(("WANDB_ENTITY", "WANDB_PROJECT"), place, strict=False))
            return Assigned("", run, environment=named)
    return None if note is None or note.ended else note


def _noted(job_folder: Path) -> Assigned | None:
    try:
        content = json.loads((job_folder / TRIAL_FILE).read_text(encoding="utf-8"))
        # Older versions noted only the folder.
        return Assigned(content) if isinstance(content, str) else Assigned(**content)
    except (OSError, ValueError, TypeError):
        return None


def forget(job_folder: Path) -> None:
    """Forget all trials of a job's agent."""
    for file in (job_folder / TRIAL_FILE, *agent_folder(job_folder).glob(PARAMETERS)):
        file.unlink(missing_ok=True)
