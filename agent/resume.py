"""Where a run goes on from."""

from __future__ import annotations

from pathlib import Path

from agent.config import TrialConfig
from diffusion_core.checkpoint import Checkpoint, list_checkpoints, newest_checkpoint
from diffusion_core.config_io import ConfigError, flatten

FREE_TO_CHANGE = (
    "train.device",
    "train.accumulation",
    "data.path",
    "log.",
    "checkpoint.",
    "sample.",
    "eval.",
    "preset",
)
"""Knobs that may differ when a run is resumed; all others decide what is trained."""


def find_checkpoint(config: TrialConfig, folder: Path) -> Checkpoint | None:
    """The checkpoint to continue from, after a check that it is one of this configuration."""
    if not config.checkpoint.resume:
        if list_checkpoints(folder):
            raise ConfigError(
                f"checkpoint.resume = False: {str(folder)!r} holds checkpoints already; choose another log.dir"
            )
        return None
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        now, then = flatten(config), checkpoint.metadata["config"]
        for key, value in now.items():
            if key in then and then[key] != value and not key.startswith(FREE_TO_CHANGE):
                raise ConfigError(
                    f"{key} = {value!r}: the run in {str(folder.parent)!r} was started with {then[key]!r}; choose "
                    f"another log.dir, or set it back to continue"
                )
    return checkpoint
