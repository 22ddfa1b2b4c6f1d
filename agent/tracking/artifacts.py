"""Download checkpoints from W&B. Only files that belong to a checkpoint are written, and none is executed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from agent.tracking.api import api_errors, failures, find_artifact
from agent.tracking.environment import has_key, load_environment
from diffusion_core.checkpoint import (
    FILE_NAME,
    METADATA_FILE,
    Checkpoint,
    CheckpointError,
    newest_checkpoint,
    read_checkpoint,
    step_folder,
)
from diffusion_core.choice import choose
from diffusion_core.files import replaced_folder
from diffusion_core.messages import one_line
from diffusion_core.run_folder import HISTORY_FILE
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import BEST, MODEL, STATE
from diffusion_core.training.resume import NEEDED

if TYPE_CHECKING:
    from wandb import Artifact
    from wandb.sdk.wandb_run import Run

    from pruning.start import Source


T = TypeVar("T")

DOWNLOAD_WITHIN = "DIFFUSION_SWEEPS_DOWNLOAD_WITHIN"
"""Environment variable: seconds after which a trial gives up downloading its checkpoint."""

DOWNLOAD_WITHIN_S = 300.0
FIRST_PAUSE_S, MOST_PAUSE_S = 2.0, 30.0


class NotDownloaded(CheckpointError):
    """W&B did not hand out a checkpoint. Without it, the run would lose what it has learned."""


@dataclass(frozen=True)
class Model:
    """A `model` artifact on disk.

    Attributes:
        path: folder of the checkpoint.
        name: ``ENTITY/PROJECT/NAME:VERSION``.
    """

    path: Path
    name: str


def download_model(name: str, option: str = "--artifact", instead: str = "--checkpoint", which: str = BEST) -> Model:
    """Download a `model` artifact, unless W&B has cached it.

    Args:
        name: ``NAME`` or ``NAME:ALIAS``, optionally preceded by ``PROJECT/`` or ``ENTITY/PROJECT/``.
        option: the option that gave the name, for messages.
        instead: the option that takes a checkpoint on disk, for messages.
        which: version to take if the name has no alias: ``best``, ``newest`` or a step.

    Raises:
        CheckpointError: if the artifact does not exist, is no checkpoint, or W&B cannot be reached.
    """
    load_environment()
    if not has_key():
        raise CheckpointError(
            f"{option} = {name!r}: no W&B API key; set WANDB_API_KEY (see .env.example), run `wandb login`, or use "
            f"{instead}"
        )
    with api_errors(f"{option} = {name!r}", CheckpointError):
        artifact = find_artifact(name, which)
        if artifact.type != MODEL:
            raise CheckpointError(f"{option} = {name!r}: its type is {artifact.type!r}; expected 'model'")
        folder = Path(os.environ.get("WANDB_ARTIFACT_DIR", "artifacts")) / artifact.name.replace(":", "-")
        download_files(artifact, folder)
        bare = artifact.name.partition(":")[0]  # Drop the alias, which may move to another version.
        return Model(folder, f"{artifact.entity}/{artifact.project}/{bare}:{artifact.version}")


def open_source(checkpoint: str | Path | None, artifact: str | None, option: str, which: str = BEST) -> Source | None:
    """Read the checkpoint that is given by its path or its artifact. None if neither is given.

    Args:
        checkpoint: its path.
        artifact: its artifact.
        option: prefix of both options: ``init.``, ``distill.`` or ``--``. For messages.
        which: checkpoint of a run's folder, or version of an artifact without alias: ``best``, ``newest`` or a step.

    Raises:
        CheckpointError: if it cannot be read or downloaded.
    """
    from pruning.start import Source

    if artifact is not None:
        model = download_model(artifact, f"{option}artifact", f"{option}checkpoint", which)
        return Source(choose(model.path, name=model.name), model.name, option)
    if checkpoint is None:
        return None
    try:
        return Source(choose(Path(checkpoint), which), None, option)
    except CheckpointError as error:  # Most begin with the path.
        raise CheckpointError(f"{option}checkpoint = {error}" if str(error)[0] in "'\"" else str(error)) from None


def download_files(artifact: Artifact, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Download files of an artifact that holds a part of a checkpoint. W&B verifies its own hashes.

    Args:
        artifact: the artifact on W&B.
        folder: destination.
        wanted: selects files by name.

    Raises:
        CheckpointError: if the artifact names a file that no checkpoint has, such as a path outside the folder, or
            refers to a file elsewhere. Nothing is written then.
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
    """Return whether a checkpoint's folder may hold a file of this name."""
    return name in (METADATA_FILE, HISTORY_FILE) or FILE_NAME.fullmatch(name) is not None


def fetch_checkpoint(
    run: Run, folder: Path, *, run_id: str | None = None, without: Collection[str] = ()
) -> Checkpoint | None:
    """Download the newest checkpoint of a W&B run if it is newer than those on this disk.

    Args:
        run: the run of this process.
        folder: folder of the checkpoints.
        run_id: the run that logged the checkpoint; None: ``run``. It is in the same project.
        without: parts to leave out.

    Returns:
        The verified checkpoint; None if W&B has no newer intact one.

    Raises:
        NotDownloaded: if W&B does not answer, or not with the files.
    """
    try:
        here = newest_checkpoint(folder, NEEDED)
    except CheckpointError:  # All of them are damaged.
        here = None

    def fetch() -> Checkpoint | None:
        models, states = uploaded_versions(run, run_id or run.id)
        for step in sorted(models.keys() & states.keys(), reverse=True):
            if here is not None and step <= here.step:
                return None
            try:
                return _download([models[step], states[step]], folder, step, without)
            except CheckpointError as error:
                say(f"W&B: skipped the checkpoint of step {step}: {error}")
        return None

    return _again_and_again(fetch)


def fetch_best(run: Run, folder: Path) -> None:
    """Download the best checkpoint of a W&B run without its training state, unless it is on this disk.

    Args:
        run: the run of this process.
        folder: folder of the checkpoints. The newest one names the best step.
    """
    newest = newest_checkpoint(folder, NEEDED)
    best = newest.metadata.get("best") if newest else None
    if not best or (folder / step_folder(best["step"])).exists():
        return

    def fetch() -> None:
        models, _ = uploaded_versions(run, run.id)
        if best["step"] in models:
            _download([models[best["step"]]], folder, best["step"], ())

    _again_and_again(fetch)


def _again_and_again(fetch: Callable[[], T]) -> T:
    """Call a function that reads from W&B until it succeeds, for a limited time.

    Raises:
        NotDownloaded: if it keeps failing.
    """
    end, pause = time.monotonic() + float(os.environ.get(DOWNLOAD_WITHIN, DOWNLOAD_WITHIN_S)), FIRST_PAUSE_S
    while True:
        try:
            return fetch()
        except failures() as error:
            reason = one_line(error)
            if time.monotonic() + pause > end:
                raise NotDownloaded(
                    f"W&B has a checkpoint of this run, or may have one, but did not hand it out ({reason}); run the "
                    "same command again, or start over with --checkpoint.resume=false"
                ) from None
        say(f"W&B: could not download a checkpoint of this run ({reason}); trying again")
        time.sleep(pause)
        pause = min(2 * pause, MOST_PAUSE_S)


def uploaded_versions(run: Run, run_id: str) -> tuple[dict[int, Artifact], dict[int, Artifact]]:
    """Return the versions, by step, of the `model` and the `training-state` artifact of a run in ``run``'s project."""
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
