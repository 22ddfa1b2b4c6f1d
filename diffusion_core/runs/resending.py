"""Send again what W&B lacks of a run's folder: rows, summary, checkpoints, and lineage (artifacts that it used)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusion_core.checkpoint import Checkpoint, CheckpointError, list_checkpoints, read_checkpoint
from diffusion_core.choice import best_of
from diffusion_core.config import ConfigError, read_yaml
from diffusion_core.messages import listed
from diffusion_core.run_folder import CHECKPOINTS, CONFIG_FILE, DATA_FILE, read_history
from diffusion_core.runs.recorded import best_summary, log_checkpoint, log_rows, model_files
from diffusion_core.runs.result import read_result
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import LINEAGE, MODEL, STATE, Tracker, Upload

MOST_KEYS = 5
"""Number of knobs that a message names."""


def recorded_config(folder: Path, check: Callable[[Mapping[str, Any]], object]) -> dict[str, Any]:
    """Return what a run was trained with, by dotted key: as its newest readable checkpoint says, else `config.yaml`.

    Print it if `config.yaml` says otherwise than the checkpoint, or cannot be read.

    Args:
        folder: the run's folder.
        check: raises ConfigError if values cannot be those of a run.

    Raises:
        ConfigError: if there is no checkpoint, and `config.yaml` cannot be read or holds wrong values.
    """
    file, checkpoint = folder / CONFIG_FILE, _newest_readable(folder / CHECKPOINTS)
    try:
        values = read_yaml(file)
        if checkpoint is None:
            check(values)
            return values
    except ConfigError as error:
        problem = str(error).removeprefix(f"--config = {str(file)!r}: ")
        if checkpoint is None:
            raise ConfigError(
                f"{str(file)!r}: {problem}; correct it, or repeat the trial's command with --log.dir={folder}, which "
                "writes it anew"
            ) from None
        note = f"{str(file)!r}: {problem}; W&B gets the configuration of the checkpoint of step {checkpoint.step}"
        print(note, file=sys.stderr)
        return dict(checkpoint.metadata["config"])
    known = dict(checkpoint.metadata["config"])
    if others := [key for key in known | values if key not in known or values.get(key) != known[key]]:
        shown = f"differs from the checkpoint of step {checkpoint.step} in {listed(others, MOST_KEYS)}"
        print(f"{file}: {shown}; W&B gets the checkpoint's", file=sys.stderr)
    return known


def _newest_readable(folder: Path) -> Checkpoint | None:
    for path in reversed(list_checkpoints(folder)):
        with suppress(CheckpointError):
            return read_checkpoint(path, verify=False)
    return None


def wants_uploads(folder: Path) -> bool:
    """Return whether the checkpoints of a run are to be uploaded. The newest command decides, which wrote the file."""
    with suppress(ConfigError):
        return bool(read_yaml(folder / CONFIG_FILE).get("checkpoint.upload", True))
    return True


def lineage_in(unsent: Iterable[str]) -> list[str]:
    """Return the entries that are lineage, of those that say what W&B lacks."""
    return [entry for entry in unsent if entry.startswith(LINEAGE)]


def log_folder(
    tracker: Tracker, folder: Path, run_id: str, checkpoints: Iterable[Path], ttl_days: int | None = None
) -> bool:
    """Log the rows and the summary of a run's folder, and some checkpoints of it. Return whether it has a result.

    Args:
        tracker: receives them. It skips rows that it has already.
        folder: the run's folder.
        run_id: names the artifacts.
        checkpoints: those to upload, oldest first.
        ttl_days: days until the server may delete what resuming needs. None keeps it.
    """
    rows = read_history(folder)
    log_rows(tracker, folder, rows)
    if stored := read_result(folder):
        result, logged = stored[0], {key for row in rows for key in row}
        known = {key: value for key, value in result.figures.items() if key not in logged}
        tracker.summary(known | best_summary(result.best_checkpoint))
    best = best_of(folder / CHECKPOINTS) or {}
    for checkpoint in map(read_checkpoint, checkpoints):
        is_best = best.get("step") == checkpoint.step
        log_checkpoint(tracker, checkpoint, run_id, is_best=is_best, history=rows, ttl_days=ttl_days)
    return stored is not None


def log_lineage(tracker: Tracker, folder: Path, unsent: Iterable[str], staged: Sequence[Path]) -> None:
    """Record again that a run used artifacts, where W&B lacks that. Upload those that came from the run itself.

    Args:
        tracker: receives it.
        folder: the run's folder.
        unsent: what W&B lacks, as ``run.json`` names it.
        staged: folders of files that the run's processes have staged for uploads, oldest first.
    """
    for name in (entry.removeprefix(LINEAGE) for entry in lineage_in(unsent)):
        if name.startswith("data-") and (folder / DATA_FILE).is_file():
            tracker.use(name, "dataset", [folder / DATA_FILE])
            continue
        own = [path for path in staged if path.name.startswith(f"{name}-")]
        if own and (upload := _staged_model(name, own[-1])):
            tracker.artifact(upload)
        tracker.use(name, STATE if name.startswith(f"{STATE}-") else MODEL)


def _staged_model(name: str, folder: Path) -> Upload | None:
    """Return the upload that was staged in a folder; None if it is damaged."""
    try:
        checkpoint = read_checkpoint(folder)
    except CheckpointError:
        return None
    extra: dict[str, Any] = checkpoint.metadata["extra"]
    return Upload(name, MODEL, model_files(checkpoint), ["latest"], extra)


def succeeds(command: Sequence[str], within_s: float) -> bool:
    """Run a command that sends a run again. Return whether it succeeded; if not, print the last line of its errors.

    Args:
        command: its words.
        within_s: seconds that it may take.
    """
    try:
        # In a session of its own: a signal to all processes of the trial ended the first client.
        done = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=within_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        say(f"W&B: {error}")
        return False
    if done.returncode != 0:
        say(done.stderr.strip().rpartition("\n")[2])
    return done.returncode == 0
