"""Where a run goes on from: the newest whole checkpoint, of this disk or of W&B."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.artifacts import download_files
from agent.checkpoints import MODEL, STATE
from agent.config import TrialConfig
from agent.redact import redacted
from diffusion_core.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    step_folder,
)
from diffusion_core.config_io import ConfigError, flatten

if TYPE_CHECKING:
    from wandb import Artifact
    from wandb.sdk.wandb_run import Run

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


def find_checkpoint(config: TrialConfig, folder: Path) -> Checkpoint | None:
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


def check_same_run(config: TrialConfig, then: Mapping[str, Any], folder: Path) -> None:
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


def fetch_checkpoint(
    run: Run, folder: Path, *, run_id: str | None = None, without: Collection[str] = ()
) -> Checkpoint | None:
    """Download the newest checkpoint of a W&B run, if it is newer than those on this disk.

    Args:
        run: the run that goes on here.
        folder: of its checkpoints.
        run_id: of another run of the same project, whose checkpoint it is.
        without: parts that are not needed.

    Returns:
        What was downloaded, verified; None if W&B has nothing newer that is whole, or does not answer.
    """
    import wandb

    try:
        here = newest_checkpoint(folder, NEEDED)
    except CheckpointError:  # All of them are damaged.
        here = None
    newest_step = here.step if here else -1
    try:
        models, states = uploaded_versions(run, run_id or run.id)
        for step in sorted(models.keys() & states.keys(), reverse=True):
            if step <= newest_step:
                return None
            try:
                return _download([models[step], states[step]], folder, step, without)
            except CheckpointError as error:
                print(f"W&B: passing over the checkpoint of step {step}: {error}", file=sys.stderr)
    except (wandb.errors.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        print(f"W&B: no checkpoint of this run could be downloaded ({reason})", file=sys.stderr)
    return None


def fetch_best(run: Run, folder: Path) -> None:
    """Download the best checkpoint of a W&B run, as far as sampling needs it, if it is not on this disk.

    Args:
        run: the run that goes on here.
        folder: of its checkpoints; the newest one says which is the best.
    """
    import wandb

    try:
        newest = newest_checkpoint(folder, NEEDED)
        best = newest.metadata.get("best") if newest else None
        if not best or (folder / step_folder(best["step"])).exists():
            return
        models, _ = uploaded_versions(run, run.id)
        if best["step"] in models:
            _download([models[best["step"]]], folder, best["step"], ())
    except (CheckpointError, wandb.errors.Error, ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        print(f"W&B: the best checkpoint of this run could not be downloaded ({reason})", file=sys.stderr)


def uploaded_steps(run: Run) -> set[int]:
    """The steps of which W&B has a whole checkpoint of a run."""
    models, states = uploaded_versions(run, run.id)
    return models.keys() & states.keys()


def uploaded_versions(run: Run, run_id: str) -> tuple[dict[int, Artifact], dict[int, Artifact]]:
    """The versions of a run's `model` and `training-state` artifacts, by step; it is of the same project as ``run``."""
    import wandb

    api = wandb.Api()

    def versions(kind: str) -> dict[int, Artifact]:
        name = f"{run.entity}/{run.project}/{kind}-{run_id}"
        if not api.artifact_collection_exists(name, kind):
            return {}
        found = [(artifact.metadata.get("step"), artifact) for artifact in api.artifacts(kind, name)]
        return {step: artifact for step, artifact in found if type(step) is int}

    return versions(MODEL), versions(STATE)


def _download(artifacts: list[Artifact], folder: Path, step: int, without: Collection[str]) -> Checkpoint:
    partial = folder / f".{step_folder(step)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for artifact in artifacts:
            download_files(artifact, partial, lambda name: name.removesuffix(".safetensors") not in without)
        checkpoint = read_checkpoint(partial)
        if checkpoint.step != step:
            raise CheckpointError(f"it says that it is of step {checkpoint.step}")
        final = folder / step_folder(step)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        return Checkpoint(final, checkpoint.metadata)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
