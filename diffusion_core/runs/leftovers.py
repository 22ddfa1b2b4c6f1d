"""Find checkpoints and staged uploads in a run's folder that nothing refers to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_core.checkpoint import delete_checkpoint, list_checkpoints, read_checkpoint, step_folder
from diffusion_core.run_folder import CHECKPOINTS, SYNCED, UNSENT, read_run_file


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


def on_disk(folder: Path) -> Iterator[Leftover]:
    """Yield the unreferenced checkpoints and uploads in a run's folder.

    Raises:
        CheckpointError: if the newest checkpoint is damaged.
        ConfigError: if ``run.json`` is.
    """
    checkpoints = folder / CHECKPOINTS
    paths = list_checkpoints(checkpoints)
    if paths:
        newest = read_checkpoint(paths[-1], verify=False).metadata
        best = newest.get("best") or {}
        kept = kept_checkpoints(paths, int(newest["config"].get("checkpoint.keep", 2)), best.get("step"))
        yield from (_folder(path, delete_checkpoint) for path in paths if path not in kept)
    yield from (_folder(path) for path in checkpoints.glob(".step-*.*"))
    if read_run_file(folder).get(UNSENT):  # `agent.sync` sends staged uploads again.
        return
    for run in (folder / "wandb").glob("*run-*"):
        arrived = not run.name.startswith("offline-") or any(run.glob(f"*{SYNCED}"))
        if arrived and (run / "staged").is_dir() and not run.is_symlink():
            yield from (_folder(path) for path in (run / "staged").iterdir())


def _folder(path: Path, delete: Callable[[Path], object] = shutil.rmtree) -> Leftover:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Leftover(str(path), size, lambda: delete(path))


def kept_checkpoints(paths: Sequence[Path], keep: int, best_step: int | None) -> list[Path]:
    """Return those of a run's checkpoints to keep, oldest first as they are given: the newest and the best one."""
    best = None if best_step is None else step_folder(best_step)
    return [path for path in paths if path.name == best or path in paths[-keep:]]
