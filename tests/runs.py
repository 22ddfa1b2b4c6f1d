"""Folders of runs that tests read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import TINY, digits, lively

from agent.config import build_config
from agent.trial import run_trial
from diffusion_core.checkpoint import read_checkpoint, write_checkpoint
from diffusion_core.tracking import NullTracker


def lively_run(folder: Path, **changes: Any) -> Path:
    """A run's folder, whose averaged weights are made lively so that images differ."""
    settings = TINY | {"train.steps": 2, "checkpoint.upload": False, "sample.every": 0, "eval.num_images": 10}
    config = build_config(settings | {key.replace("__", "."): value for key, value in changes.items()})
    result = run_trial(config, NullTracker(), dataset=digits(), folder=folder, run_id="run")
    checkpoint = read_checkpoint(result.best_checkpoint)
    parts = {part: checkpoint.tensors(part) for part in checkpoint.parts}
    parts["ema"] = lively(checkpoint.network()).state_dict()
    if "label_embedding.weight" in parts["ema"]:
        parts["ema"]["label_embedding.weight"] *= 20  # So that the label can be seen.
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in ("format", "step", "files")}
    write_checkpoint(folder / "checkpoints", checkpoint.step, metadata, parts)
    return folder
