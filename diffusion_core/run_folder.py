"""The folder of a run: what is in it, and how to read it back.

runs/ID/
    run.json              the W&B run id, where it belongs, and how often the run was preempted
    data.json             which images: names, counts, a hash
    lock                  held by the process that works on the run
    config.yaml           every knob; `--config` reads it
    history.jsonl         a row of figures per logging interval
    protocols.json        how each figure of generated images was measured
    checkpoints/step-*/   see diffusion_core/checkpoint.py
    samples/              grids (PNG) and animations (GIF)
    result.json           once the run is finished
    wandb/                W&B's own files
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from diffusion_core.config import ConfigError
from diffusion_core.config.metrics import goal_of, is_better
from diffusion_core.tracking import STEP

RUN_FILE = "run.json"
DATA_FILE = "data.json"
LOCK_FILE = "lock"
ENVIRONMENT = "environment"
BELONGS_BY = ("WANDB_ENTITY", "WANDB_PROJECT", "WANDB_SWEEP_ID", "WANDB_RUN_GROUP")
"""Variables that say where on W&B a run belongs; `run.json` remembers them. (No address: a key is sent there.)"""

CONFIG_FILE = "config.yaml"
HISTORY_FILE = "history.jsonl"
PROTOCOLS_FILE = "protocols.json"
RESULT_FILE = "result.json"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"


def make_folder(folder: Path) -> None:
    """Make a run's folder.

    Raises:
        ConfigError: if that is impossible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"log.dir = {str(folder)!r}: {reason}; choose another folder") from None


def run_folders(folder: Path) -> list[Path]:
    """The folders of runs at a folder and below it."""
    return sorted(found.parent for found in folder.rglob(RUN_FILE) if (found.parent / HISTORY_FILE).is_file())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Work on a run's folder, alone.

    Raises:
        ConfigError: if another process works on it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder / LOCK_FILE))
        except Held as other:
            raise ConfigError(
                f"log.dir = {str(folder)!r}: process {other} works on this run; wait for it, or choose another folder"
            ) from None
        yield


def read_run_file(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says; empty if there is none.

    Raises:
        ConfigError: if it is damaged.
    """
    try:
        if not (folder / RUN_FILE).is_file():
            return {}
        content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        belongs = {name: str(value) for name, value in content.get(ENVIRONMENT, {}).items() if name in BELONGS_BY}
        preemptions = int(content.get("preemptions", 0))
        return {"id": str(content["id"]), "preemptions": preemptions, ENVIRONMENT: belongs}
    except OSError as error:
        raise ConfigError(f"log.dir = {str(folder)!r}: {error.strerror}; choose another folder") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"log.dir = {str(folder)!r}: its {RUN_FILE} is damaged; choose another folder") from None


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's history; a line that a crash cut short is passed over."""
    file = folder / HISTORY_FILE
    rows: list[dict[str, Any]] = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            row = _parse_row(line)
            if row is None:
                print(f"{file}: passing over a damaged line", file=sys.stderr)
            else:
                rows.append(row)
    return rows


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get(STEP)) is not int:
        return None
    return row if all(isinstance(value, int | float) for value in row.values()) else None


def without_step(row: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a row of history."""
    return {key: value for key, value in row.items() if key != STEP}


def picture_files(folder: Path, step: int) -> dict[str, Path]:
    """The pictures that were drawn at a step, by the names under which they are logged."""
    files = sorted((folder / SAMPLES).glob(f"*-{step:08d}.*"))
    return {file.name.removesuffix(f"-{step:08d}{file.suffix}"): file for file in files}


def best_figures(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure its best value, if it has a goal, else its last."""
    figures: dict[str, float] = {}
    for row in history:
        for key, value in row.items():
            if key != STEP and (goal_of(key) is None or is_better(key, value, figures.get(key))):
                figures[key] = value
    return figures


class Held(Exception):
    """Another process holds the lock; the message is its id, or ``unknown``."""


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold a lock. It ends with the process, however that ends; what is left of the file means nothing.

    Raises:
        Held: if another process holds it.
        OSError: if the file cannot be written.
    """
    with file.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Held(lock.read().strip() or "unknown") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
