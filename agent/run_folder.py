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

import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from agent.folder_lock import Held, held
from diffusion_core.config_io import ConfigError
from diffusion_core.figure_names import goal_of, is_better
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


def find_run(configured: str | None) -> tuple[str, Path]:
    """The id of this run, and its folder.

    Under an agent the id is the agent's; a folder that holds a run keeps that run's id; else the id is new. A folder
    that is not configured is ``runs/<id>``.

    Raises:
        ConfigError: if the folder's ``run.json`` is damaged.
    """
    run_id = os.environ.get("WANDB_RUN_ID")
    if configured is None:
        run_id = run_id or secrets.token_hex(4)
        return run_id, Path("runs") / run_id
    folder = Path(configured)
    return run_id or read_run_file(folder).get("id") or secrets.token_hex(4), folder


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


def belongs_here() -> dict[str, str]:
    """Where on W&B this process's run belongs, by its environment."""
    return {name: os.environ[name] for name in BELONGS_BY if name in os.environ}


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


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one piece."""
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, content: str) -> None:
    """Write a text file in one piece: under another name, flushed, then renamed."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
