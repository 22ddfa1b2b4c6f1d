"""Send what a run's folder holds to a tracker: rows with their pictures, and checkpoints. PyTorch is not imported."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_core.checkpoint import METADATA_FILE, SAMPLING_PARTS, Checkpoint, CheckpointError, read_checkpoint
from diffusion_core.config.metrics import goal_of
from diffusion_core.files import write_json_lines
from diffusion_core.run_folder import CLASSIFIER_FILE, HISTORY_FILE, picture_files, without_step
from diffusion_core.tracking import BEST, MODEL, STATE, STEP, Tracker, Upload


def log_rows(tracker: Tracker, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log rows of a run's history with their pictures. The tracker skips rows that it has already."""
    for row in rows:
        tracker.log(without_step(row) | picture_files(folder, row[STEP]), row[STEP])


def read_table(path: Path, wrap: Callable[[Any], Any]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of a table that a run wrote.

    Args:
        path: JSON: a list of equal objects, whose ``image`` is a PNG in base64.
        wrap: called with each image, as Pillow reads it.
    """
    from PIL import Image

    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        row["image"] = wrap(Image.open(io.BytesIO(base64.b64decode(row["image"]))))
    return list(rows[0]) if rows else [], [list(row.values()) for row in rows]


def model_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files of a `model` artifact: all that sampling needs."""
    parts = [checkpoint.path / f"{part}.safetensors" for part in checkpoint.parts if part in SAMPLING_PARTS]
    return [checkpoint.path / METADATA_FILE, *parts]


def best_summary(path: Path) -> dict[str, float]:
    """Return what is measured of a run's best checkpoint for its summary: ``best/FIGURE``, and ``best/step``.

    The summary's other figures are the best values of the whole run: they may be of several checkpoints, and W&B nests
    them (``{"val/loss": {"min": 0.1}}``), so that a search on the user's machine (``wandb sweep-scheduler``) cannot
    read them.

    Args:
        path: folder of the checkpoint. If it cannot be read, the result is empty.
    """
    try:
        checkpoint = read_checkpoint(path, verify=False)
    except CheckpointError:
        return {}
    figures = {name: value for name, value in checkpoint.metadata["figures"].items() if goal_of(name) is not None}
    return {f"{BEST}/{name}": value for name, value in (figures | {STEP: checkpoint.step}).items()}


def log_checkpoint(
    tracker: Tracker,
    checkpoint: Checkpoint,
    run_id: str,
    *,
    is_best: bool,
    history: Sequence[Mapping[str, Any]],
    ttl_days: int | None,
) -> None:
    """Upload a checkpoint as two artifacts: what sampling needs, and what resuming needs as well, if it has that.

    Args:
        tracker: receives the artifacts.
        checkpoint: on the disk.
        run_id: names the artifacts.
        is_best: whether it is the best one of its run so far.
        history: rows of the run. Those up to the checkpoint's step are uploaded, for resuming on another machine.
        ttl_days: days until the server may delete the second artifact. None keeps it.
    """
    aliases = ["latest", f"step-{checkpoint.step}", *([BEST] if is_best else [])]
    described = {
        "step": checkpoint.step,
        "config": checkpoint.metadata["config"],
        "figures": checkpoint.metadata["figures"],
        **checkpoint.metadata["extra"],
    }
    rows = checkpoint.path / HISTORY_FILE
    write_json_lines(rows, (row for row in history if row[STEP] <= checkpoint.step))
    uploads = [Upload(f"{MODEL}-{run_id}", MODEL, model_files(checkpoint), aliases, described)]
    training = [checkpoint.path / f"{part}.safetensors" for part in checkpoint.parts if part not in SAMPLING_PARTS]
    if training:  # A checkpoint that was downloaded for sampling has none.
        judge = checkpoint.path.parent.parent / CLASSIFIER_FILE
        files = [checkpoint.path / METADATA_FILE, *training, rows, *([judge] if judge.is_file() else [])]
        uploads.append(Upload(f"{STATE}-{run_id}", STATE, files, aliases, described, ttl_days))
    tracker.artifact(*uploads)


def flat_summary(summary: Any) -> dict[str, Any]:
    """Return a run's summary with plain values.

    W&B nests the best value of a figure with a goal: ``{"val/loss": {"min": 0.1}}``.
    """
    flat: dict[str, Any] = {}
    for key, value in dict(summary).items():
        items = getattr(value, "items", None)
        if items is not None:
            value = next((best for kind, best in items() if kind in ("min", "max")), None)
        if value is not None:
            flat[key] = value
    return flat


def summary_figures(summary: Any) -> dict[str, float]:
    """Return the numbers of a run's summary, as :func:`flat_summary` does."""
    return {key: value for key, value in flat_summary(summary).items() if isinstance(value, int | float)}
