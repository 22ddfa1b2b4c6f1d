"""Which checkpoint a command takes: one rule for all commands.

The path of a checkpoint is that checkpoint. Of a run's folder, a command takes the best checkpoint: the one with the
best ``checkpoint.best_metric``. It takes the newest one if none was measured, or if the best is not on the disk. The
flag ``--which`` chooses another. Each command prints in one line what it took.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_core.checkpoint import (
    METADATA_FILE,
    SAMPLING_PARTS,
    Checkpoint,
    CheckpointError,
    damaged_after,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    step_folder,
    step_of,
)
from diffusion_core.config.ranking import BROKEN
from diffusion_core.redact import redact
from diffusion_core.run_folder import CHECKPOINTS, ROUNDS, SWEEP_RESULTS, SWEEP_TRIALS
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import BEST

NEWEST = "newest"


def add_which_flag(parser: argparse.ArgumentParser, of: str = "a run's folder") -> None:
    """Add ``--which``. ``of`` says in the help text what it chooses from."""
    parser.add_argument(
        "--which",
        default=BEST,
        metavar="WHICH",
        help=f"checkpoint of {of}: {BEST} (the default; by checkpoint.best_metric), {NEWEST}, or a step",
    )


def wanted_step(which: str) -> int | None:
    """Return the step that ``--which`` names; None for the best and the newest checkpoint.

    Raises:
        CheckpointError: if it is something else.
    """
    if which in (BEST, NEWEST):
        return None
    if not which.isascii() or not which.isdecimal():
        raise CheckpointError(f"--which = {which!r}: expected {BEST}, {NEWEST}, or a step such as 5000")
    return int(which)


def choose(
    path: Path, which: str = BEST, *, name: str | None = None, parts: Collection[str] = SAMPLING_PARTS
) -> Checkpoint:
    """Return the verified checkpoint that a path names. :func:`announce` prints which one it is.

    Args:
        path: a checkpoint, a folder of checkpoints, or a run's folder.
        which: ``best``, ``newest`` or a step.
        name: what to call it; None: its path.
        parts: what it must hold, if there is a choice.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
    """
    step = wanted_step(which)
    folder = next((place for place in (path, path / CHECKPOINTS) if list_checkpoints(place)), None)
    if folder is None or os.path.isfile(path / METADATA_FILE):
        found, how = read_checkpoint(path), ""
        if step is not None and step != found.step:
            raise CheckpointError(f"--which = {which!r}: {str(path)!r} is the checkpoint of step {found.step}")
    elif step is not None:
        found, how = _at(folder, step), ""
    else:
        found, how = _best_or_newest(folder, which, parts)
    return replace(found, chosen=redact(f"{name or found.path}, step {found.step}{how}"))


def check_weights(checkpoint: Checkpoint, weights: str) -> None:
    """Check that a checkpoint holds the weights that ``--weights`` names.

    Raises:
        CheckpointError: if it does not; the message names those that it holds.
    """
    held = [part for part in checkpoint.parts if part in ("ema", "model") or part.startswith("ema-")]
    if weights not in held:
        raise CheckpointError(f"--weights = {weights!r}: {str(checkpoint.path)!r} holds {', '.join(held)}")


def announce(*checkpoints: Checkpoint) -> None:
    """Print which checkpoints a command takes, a line each, on stderr in the first process.

    Commands call it as their work begins, so that a refusal is one line.
    """
    if os.environ.get("RANK", "0") == "0":
        for checkpoint in checkpoints:
            say(f"checkpoint: {checkpoint.chosen}")


def best_of(folder: Path) -> dict[str, Any] | None:
    """Return metric, value and step of the best checkpoint of a run, as its newest readable checkpoint names them."""
    for path in reversed(list_checkpoints(folder)):
        try:
            best = read_checkpoint(path, verify=False).metadata.get("best")
        except CheckpointError:
            continue
        return best if isinstance(best, dict) and type(best.get("step")) is int else None
    return None


def best_of_sweep(folder: Path) -> Path:
    """Return the folder of the best trial of an offline sweep; of a lottery, that of the best round.

    It is looked up in the sweep's folder, which may have been moved or copied since the results were written.

    Raises:
        CheckpointError: if the folder holds no results, no trial has a checkpoint, or the best trial is not there.
    """
    try:
        trials = json.loads((folder / SWEEP_RESULTS).read_text(encoding="utf-8"))
        trials = [trial for trial in trials if trial.get("state") not in BROKEN]
        place = next(place for place, trial in enumerate(trials) if trial["best_checkpoint"])
        best, better = folder / SWEEP_TRIALS / trials[place]["id"], [trial["id"] for trial in trials[:place]]
        round_of_lottery = Path(trials[place]["best_checkpoint"]).parts[-4:-2]
    except (OSError, ValueError, StopIteration, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"--sweep = {str(folder)!r}: no finished trial in its {SWEEP_RESULTS}; name the folder of an offline sweep"
        ) from None
    if not best.is_dir():
        raise CheckpointError(f"--sweep = {str(folder)!r}: its best trial {best.name} is not in it; copy {best} too")
    if better and os.environ.get("RANK", "0") == "0":
        say(f"--sweep = {str(folder)!r}: no checkpoint of {', '.join(better)}, which {SWEEP_RESULTS} puts first")
    return best.joinpath(*round_of_lottery) if (best / ROUNDS).is_dir() else best


def _at(folder: Path, step: int) -> Checkpoint:
    paths = list_checkpoints(folder)
    if folder / step_folder(step) not in paths:
        there = ", ".join(str(step_of(path)) for path in paths)
        raise CheckpointError(f"--which = {str(step)!r}: {str(folder)!r} holds the steps {there}")
    return read_checkpoint(folder / step_folder(step))


def _best_or_newest(folder: Path, which: str, parts: Collection[str]) -> tuple[Checkpoint, str]:
    """Return the checkpoint, and how it was chosen, as the end of the line that is printed."""
    best = best_of(folder)
    value = best.get("value") if best is not None else None
    by = f" by {best.get('metric')} ({value:.6g})" if best is not None and isinstance(value, int | float) else ""
    why = "; none was measured as the best"
    if best is not None and which == BEST:
        try:
            found = _at(folder, best["step"])
        except CheckpointError:
            why = f"; the best{by}, of step {best['step']}, is not here or damaged"
        else:
            newest = step_of(list_checkpoints(folder)[-1])
            if set(parts) <= set(found.parts):
                return found, f": the best{by}" + (f"; the newest is of step {newest}" if newest != found.step else "")
            why = f"; the best{by}, of step {best['step']}, lacks {', '.join(sorted(set(parts) - set(found.parts)))}"
    found_one = newest_checkpoint(folder, parts) or newest_checkpoint(folder)
    if found_one is None:  # Deleted meanwhile.
        raise CheckpointError(f"{str(folder)!r}: no checkpoint here")
    if which == NEWEST:
        is_other = best is not None and best["step"] != found_one.step
        why = f"; the best{by} is of step {best['step']}" if best is not None and is_other else ""
    return found_one, f": the newest{''.join(f'; {problem}' for problem in damaged_after(found_one))}{why}"
