"""Find the checkpoint that a run resumes from, and check that it was trained with the same configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_core.checkpoint import Checkpoint, list_checkpoints, newest_checkpoint
from diffusion_core.config import ConfigError, CoreConfig, flatten
from diffusion_core.redact import redacted

NEEDED = ("model",)
"""Parts that resuming needs. The best checkpoint may have been downloaded without them."""

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
"""Knobs that may change when a run resumes. All others decide what is trained."""


def find_checkpoint(config: CoreConfig, folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint to resume from, after a check of its configuration. None if there is none.

    Args:
        config: configuration of the run.
        folder: folder of the run's checkpoints.

    Raises:
        ConfigError: if there are checkpoints and ``checkpoint.resume`` is false, or a knob that decides what is trained
            differs.
        CheckpointError: if all checkpoints are damaged.
    """
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
    """Check that a run may resume with a configuration.

    Args:
        config: configuration to resume with.
        then: configuration that the run was started with, by dotted key.
        folder: the run's folder, for messages.

    Raises:
        ConfigError: if a knob that decides what is trained differs.
    """
    for key, value in redacted(flatten(config)).items():
        if key in then and then[key] != value and not key.startswith(FREE_TO_CHANGE):
            raise ConfigError(
                f"{key} = {value!r}: the run in {str(folder)!r} was started with {then[key]!r}; choose another "
                f"log.dir, or set it back to continue"
            )
