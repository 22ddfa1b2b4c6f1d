"""The checkpoint that a run goes on from, and whether it is one of the same configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_core.checkpoint import Checkpoint, list_checkpoints, newest_checkpoint
from diffusion_core.config import ConfigError, CoreConfig, flatten
from diffusion_core.redact import redacted

NEEDED = ("model",)
"""Parts without which training does not go on: the best checkpoint may have been downloaded without them."""

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


def find_checkpoint(config: CoreConfig, folder: Path) -> Checkpoint | None:
    """The checkpoint to continue from, after a check that it is one of this configuration."""
    if not config.checkpoint.resume:
        if list_checkpoints(folder):
            raise ConfigError(
                f"checkpoint.resume = False: {str(folder)!r} holds checkpoints already; choose another log.dir"
            )
        return None
    checkpoint = newest_checkpoint(folder, NEEDED)
    if checkpoint is not None:
        check_same_run(config, checkpoint.metadata["config"], folder.parent)
    return checkpoint


def check_same_run(config: CoreConfig, then: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run of another configuration.

    Args:
        config: the one to go on with.
        then: what the run was started with, by dotted key.
        folder: the run's.

    Raises:
        ConfigError: if a knob that decides what is trained differs.
    """
    for key, value in redacted(flatten(config)).items():
        if key in then and then[key] != value and not key.startswith(FREE_TO_CHANGE):
            raise ConfigError(
                f"{key} = {value!r}: the run in {str(folder)!r} was started with {then[key]!r}; choose another "
                f"log.dir, or set it back to continue"
            )
