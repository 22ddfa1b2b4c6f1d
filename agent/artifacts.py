"""Artifacts from W&B become folders on disk: only files that a checkpoint has, and nothing in them is run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent.run_folder import HISTORY_FILE
from agent.settings import DEFAULT_PROJECT, has_key, load_environment
from diffusion_core.checkpoint import FILE_NAME, METADATA_FILE, CheckpointError

if TYPE_CHECKING:
    from wandb import Artifact


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
        raise CheckpointError(f"{option} = {name!r}: {' '.join(str(error).split())[:300]}") from None


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
