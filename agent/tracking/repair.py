"""End a W&B run: send what is left, check that it arrived, and send again what did not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from agent.tracking.api import failures, server_status
from agent.tracking.artifacts import uploaded_versions
from agent.tracking.tracker import PATIENCE_S, WandbTracker
from diffusion_core.checkpoint import list_checkpoints, step_of
from diffusion_core.messages import one_line
from diffusion_core.run_folder import CHECKPOINTS, UNSENT, mark_synced, note_unsent, read_run_file
from diffusion_core.runs.resending import lineage_in, succeeds, wants_uploads
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import Tracker

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

PREEMPTED_WITHIN_S = 20.0
"""Seconds for the repair of a preempted run. Cluster managers allow about 30 s from SIGTERM to SIGKILL."""


def close_run(tracker: Tracker, folder: Path, told: int, *, preempted: bool = False) -> bool:
    """End the run of a folder on W&B. Return whether W&B has all of it, or need not have it.

    What has not arrived is sent again at once, by another process: the client of this one may have broken. If that
    fails too, or the server does not answer, it is noted in the folder, and the command that sends it is printed.

    Args:
        tracker: the run's tracker.
        folder: the run's folder.
        told: exit status that W&B is told.
        preempted: whether the run is to be resumed elsewhere.

    Raises:
        ConfigError: if ``run.json`` cannot be read.
        OSError: if the folder cannot be written. The command has been printed nevertheless.
    """
    left = tracker.close(told)
    if not isinstance(tracker, WandbTracker):
        return True
    if not left and tracker.live:
        try:
            left = [f"the checkpoint of step {step_of(path)}" for path in unsent_checkpoints(tracker.run, folder)]
        except failures() as error:
            left = [f"an answer of the server ({one_line(error)})"]
    is_offline, command = not tracker.live and not tracker.online, f"python -m agent.sync {folder}"
    if not tracker.live and tracker.online:  # W&B did not answer at the start.
        left = ["the run", *left]
    try:
        # Also what an earlier process of the run had left. Who sends it again reads the note.
        left = list(dict.fromkeys([*left, *lineage_in(read_run_file(folder).get(UNSENT, []))]))
        note_unsent(folder, left)
        if left and not is_offline and server_status() == 200:
            say(f"W&B lacks {', '.join(left)}; sending it again")
            if sent_again(folder, told, preempted):
                left = []
                note_unsent(folder, left)
        if not left and not is_offline:
            mark_synced(folder)
    finally:
        if is_offline:
            say(f"to put this run on W&B: {command}")
        elif left:
            say(f"W&B: this has not arrived yet: {', '.join(left)}; to send it: {command}")
    return is_offline or not left


def unsent_checkpoints(run: Run, folder: Path) -> list[Path]:
    """Return the checkpoints of a run's folder to upload, oldest first: from the first on that W&B lacks.

    A process that is killed between writing a checkpoint and uploading it leaves such a gap. Later ones may be there,
    but the alias of the newest version moves to whatever is uploaded last. Of all but the newest one only the model
    counts: the server may have deleted the training state after ``checkpoint.ttl_days``.
    """
    if not wants_uploads(folder):
        return []
    paths = list_checkpoints(folder / CHECKPOINTS)
    models, states = uploaded_versions(run, run.id) if paths else ({}, {})
    there = [step_of(path) in models and (path != paths[-1] or step_of(path) in states) for path in paths]
    return paths[there.index(False) :] if False in there else []


def staged_uploads(run: Run) -> list[Path]:
    """Return the folders of files that processes of a run have staged on this machine and not sent, oldest first."""
    folders = Path(run.settings.sync_dir).parent.glob(f"*run-*-{run.id}/staged/*")
    return sorted(folders, key=lambda folder: folder.stat().st_mtime)


def sent_again(folder: Path, told: int, preempted: bool) -> bool:
    """Send what W&B lacks of a run, in another process. Return whether all of it arrived."""
    words = [sys.executable, "-m", "agent.sync", str(folder), f"--ended={told}", "--locked"]
    words += ["--preempted"] if preempted else []
    return succeeds(words, PREEMPTED_WITHIN_S if preempted else 2 * PATIENCE_S)
