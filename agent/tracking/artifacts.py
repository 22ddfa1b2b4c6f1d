"""Download checkpoints from W&B: only files that a checkpoint has, and nothing in them is run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent.tracking.environment import DEFAULT_PROJECT, has_key, load_environment
from diffusion_core.checkpoint import (
    FILE_NAME,
    METADATA_FILE,
    Checkpoint,
    CheckpointError,
    newest_checkpoint,
    read_checkpoint,
    step_folder,
)
from diffusion_core.files import replaced_folder
from diffusion_core.messages import one_line
from diffusion_core.run_folder import HISTORY_FILE
from diffusion_core.tracking import MODEL, STATE
from diffusion_core.training.resume import NEEDED

if TYPE_CHECKING:
    from wandb import Artifact
    from wandb.sdk.wandb_run import Run


def full_name(name: str, entity: str | None) -> str:
    """``ENTITY/PROJECT/NAME:ALIAS`` from any shorter form; without an alias, ``latest``."""
    if ":" not in name:
        name = f"{name}:latest"
    if name.count("/") == 0:
        name = f"{os.environ.get('WANDB_PROJECT') or DEFAULT_PROJECT}/{name}"
    return f"{entity}/{name}" if name.count("/") == 1 and entity else name


@dataclass(frozen=True)
class Model:
    """A `model` artifact on disk.

    Attributes:
        path: the folder that holds the checkpoint.
        name: ``ENTITY/PROJECT/NAME:VERSION``.
    """

    path: Path
    name: str


def download_model(name: str, option: str = "--artifact", instead: str = "--checkpoint") -> Model:
    """Download a `model` artifact (what W&B has cached is not fetched again).

    Args:
        name: ``NAME:ALIAS``, optionally with ``PROJECT/`` or ``ENTITY/PROJECT/`` in front.
        option: where the name was given, for messages.
        instead: what takes a checkpoint on disk.

    Raises:
        CheckpointError: if there is no such artifact, it is no checkpoint, or W&B cannot be reached.
    """
    load_environment()
    if not has_key():
        raise CheckpointError(
            f"{option} = {name!r}: no W&B API key; set WANDB_API_KEY (see .env.example), run `wandb login`, or use "
            f"{instead}"
        )
    import wandb  # Slow to import, and --checkpoint does without it.

    try:
        api = wandb.Api()
        wanted = full_name(name, os.environ.get("WANDB_ENTITY") or api.default_entity)
        artifact = api.artifact(wanted)
        if artifact.type != "model":
            raise CheckpointError(f"{option} = {wanted!r}: its type is {artifact.type!r}; expected 'model'")
        folder = Path(os.environ.get("WANDB_ARTIFACT_DIR", "artifacts")) / artifact.name.replace(":", "-")
        download_files(artifact, folder)
        bare = artifact.name.partition(":")[0]  # Its own name may end in the alias, which moves.
        return Model(folder, f"{artifact.entity}/{artifact.project}/{bare}:{artifact.version}")
    except (wandb.errors.Error, ValueError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{option} = {name!r}: {one_line(error)}") from None


def download_files(artifact: Artifact, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Download an artifact that holds a part of a checkpoint into a folder. W&B's own hashes are verified on the way.

    Args:
        artifact: from W&B.
        folder: where to.
        wanted: which of its files, by name.

    Raises:
        CheckpointError: if it names anything that is not a file of a checkpoint, such as a path out of the folder or
            an address elsewhere; nothing is written then.
    """
    entries = artifact.manifest.entries
    for name, entry in entries.items():
        if not check_name(name):
            raise CheckpointError(f"artifact {artifact.name}: {name[:100]!r} is not a file of a checkpoint")
        if entry.ref is not None:
            raise CheckpointError(f"artifact {artifact.name}: {name!r} is a reference to {entry.ref[:100]!r}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in filter(wanted, entries):
        artifact.get_entry(name).download(root=str(folder), skip_cache=True)


def check_name(name: str) -> bool:
    """Whether a file may be in a checkpoint's folder."""
    return name in (METADATA_FILE, HISTORY_FILE) or FILE_NAME.fullmatch(name) is not None


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
        reason = one_line(error)
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
        reason = one_line(error)
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
    final = folder / step_folder(step)
    with replaced_folder(final, overwrite=True) as temporary:
        for artifact in artifacts:
            download_files(artifact, temporary, lambda name: name.removesuffix(".safetensors") not in without)
        checkpoint = read_checkpoint(temporary)
        if checkpoint.step != step:
            raise CheckpointError(f"its metadata names step {checkpoint.step}")
    return Checkpoint(final, checkpoint.metadata)
