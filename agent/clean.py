"""``python -m agent.clean``: list unreferenced checkpoints and uploads; delete them with --yes.

On this machine: checkpoints that are neither the best nor among the newest `checkpoint.keep`, unfinished checkpoints,
and staged copies of uploads that have arrived. On W&B: versions of models and training states without an alias.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.command import fail
from agent.sync import SYNCED
from agent.tracking.environment import load_environment
from agent.tracking.project import versions_without_alias
from diffusion_core.checkpoint import CheckpointError, list_checkpoints, read_checkpoint
from diffusion_core.config import ConfigError
from diffusion_core.run_folder import CHECKPOINTS, locked, run_folders
from diffusion_core.training.checkpoints import kept_checkpoints


@dataclass(frozen=True)
class Leftover:
    """An unreferenced checkpoint or upload.

    Attributes:
        name: its path, or its name on W&B.
        size: in bytes.
        remove: deletes it.
    """

    name: str
    size: int
    remove: Callable[[], object]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 2 if the folder or project does not exist."""
    parser = argparse.ArgumentParser("python -m agent.clean", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="folder of runs or of one run (runs)")
    parser.add_argument("--project", metavar="ENTITY/PROJECT", help="search a W&B project instead")
    parser.add_argument("--yes", action="store_true", help="delete them")
    arguments = parser.parse_args(argv)
    load_environment()
    try:
        if arguments.project is not None:
            found = list(on_wandb(arguments.project))
            _report(found, arguments.yes)
            return 0
        folder = arguments.folder or Path("runs")
        if not folder.is_dir():
            return fail(f"FOLDER = {str(folder)!r}: no such folder; name a folder of runs")
        for run_folder in run_folders(folder):
            try:
                with locked(run_folder):  # A process that trains the run needs its checkpoints.
                    _report(list(on_disk(run_folder)), arguments.yes)
            except ConfigError as error:
                print(f"skipped: {error}", file=sys.stderr)
    except CheckpointError as error:
        return fail(str(error))
    return 0


def _report(found: Sequence[Leftover], remove: bool) -> None:
    for leftover in found:
        print(f"{leftover.size / 1e6:10,.1f} MB  {leftover.name}{'  removed' if remove else ''}")
        if remove:
            leftover.remove()


def on_disk(folder: Path) -> Iterator[Leftover]:
    """Yield the unreferenced checkpoints and uploads in a run's folder."""
    checkpoints = folder / CHECKPOINTS
    paths = list_checkpoints(checkpoints)
    if paths:
        newest = read_checkpoint(paths[-1], verify=False).metadata
        best = newest.get("best") or {}
        kept = kept_checkpoints(checkpoints, int(newest["config"].get("checkpoint.keep", 2)), best.get("step"))
        yield from (_folder(path) for path in paths if path not in kept)
    yield from (_folder(path) for path in checkpoints.glob(".step-*.partial"))
    for run in (folder / "wandb").glob("*run-*"):
        arrived = not run.name.startswith("offline-") or any(run.glob(f"*{SYNCED}"))
        if arrived and (run / "staged").is_dir() and not run.is_symlink():
            yield from (_folder(path) for path in (run / "staged").iterdir())


def _folder(path: Path) -> Leftover:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Leftover(str(path), size, lambda: shutil.rmtree(path))


def on_wandb(project: str) -> Iterator[Leftover]:
    """Yield the versions of a project's models and training states that have no alias.

    Raises:
        CheckpointError: if W&B has no such project, or does not answer.
    """
    for version in versions_without_alias(project):
        yield Leftover(version.name, version.size, version.delete)


if __name__ == "__main__":
    sys.exit(main())
