"""The folder of a run: its files, and how to read them.

runs/ID/
    run.json              the W&B run id, entity, project and sweep, the number of preemptions, what W&B lacks
    data.json             the data set: name, counts, SHA-256
    lock                  held by the process that works on the run
    config.yaml           every knob; --config reads it
    history.jsonl         one row of figures per logging interval
    protocols.json        how each figure of generated images was measured
    classifier.safetensors  the classifier that judges them, on whatever machine the run goes on
    checkpoints/step-*/   see diffusion_core/checkpoint.py
    samples/              grids (PNG) and animations (GIF)
    result.json           the result; written when the run finishes
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

from pydantic import BaseModel

from diffusion_core.config import ConfigError, to_yaml
from diffusion_core.config.metrics import goal_of, is_better
from diffusion_core.files import DISK_FULL, write_json, write_text
from diffusion_core.messages import reason_of
from diffusion_core.redact import redacted
from diffusion_core.tracking import STEP

RUN_FILE = "run.json"
DATA_FILE = "data.json"
LOCK_FILE = "lock"
ENVIRONMENT = "environment"
UNSENT = "unsent"
"""Key of `run.json`: what W&B has not got of the run."""

BELONGS_BY = ("WANDB_ENTITY", "WANDB_PROJECT", "WANDB_SWEEP_ID", "WANDB_RUN_GROUP")
"""Variables that name a run's place on W&B, kept in `run.json`. The server's address is not: it gets the API key."""
DESCRIBED_BY = ("WANDB_NAME", "WANDB_TAGS", "WANDB_NOTES", "WANDB_JOB_TYPE")
"""Variables that describe a run on W&B, kept too. Once it is there, people may change what they said."""
PLACE = "place"
"""Key of `run.json`: ENTITY/PROJECT, once the run is on W&B."""

CONFIG_FILE = "config.yaml"
HISTORY_FILE = "history.jsonl"
PROTOCOLS_FILE = "protocols.json"
CLASSIFIER_FILE = "classifier.safetensors"
RESULT_FILE = "result.json"
CHECKPOINTS = "checkpoints"
ROUNDS = "rounds"
"""Folder of a lottery's rounds, which are runs."""
SAMPLES = "samples"
SWEEP_RESULTS = "results.json"
"""File in an offline sweep's folder with its trials, best first."""

SWEEP_STATE = "sweep.json"
"""File in an offline sweep's folder with the sweep and the state of its trials."""
SWEEP_TRIALS = "trials"
SWEEP_LOCK = ".lock"
"""File in an offline sweep's folder with the id of the process that runs it, held locked by that."""

SYNCED = ".synced"
"""Suffix of W&B's marker beside the file of an uploaded run; `wandb sync` skips files with a marker."""


def read_protocols(folder: Path) -> dict[str, str]:
    """Return how a run has measured its figures; nothing if that is unknown."""
    try:
        content = json.loads((folder / PROTOCOLS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(name): str(line) for name, line in content.items()} if isinstance(content, dict) else {}


def check_recorded(values: Mapping[str, Any], why: str) -> None:
    """Check that values which are recorded as they are, such as paths, hold no secrets.

    Args:
        values: by option or variable; may be nested.
        why: what records them, for the message.

    Raises:
        ConfigError: if one holds what looks like a key, or the value of a secret variable.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_recorded({f"{name}.{key}": entry for key, entry in value.items()}, why)
        elif (shown := redacted(value)) != value:
            raise ConfigError(
                f"{name} = {shown!r}: holds a key, or the value of a secret variable, and {why}; choose another value "
                "(40 hexadecimal digits count as a key: shorten hashes of commits)"
            )


def check_paths(folder: Path | str | None) -> None:
    """Check that the paths of a run, which W&B records, hold no secrets.

    Args:
        folder: the run's folder, if it is chosen.

    Raises:
        ConfigError: if one does.
    """
    places = {name: os.environ[name] for name in ("WANDB_DIR", "WANDB_DATA_DIR") if name in os.environ}
    check_recorded(places | ({} if folder is None else {"log.dir": str(folder)}), "W&B records the paths of a run")


def make_folder(folder: Path) -> None:
    """Make a run's folder.

    Raises:
        ConfigError: if the file system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: the name has a null byte.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"log.dir = {str(folder)!r}: {reason}; choose another folder") from None


def check_folder(folder: Path) -> None:
    """Check that a run's folder could be made, without making it.

    Raises:
        ConfigError: if a part of its path is a file, or the folder above it cannot be written.
    """
    above = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not above.is_dir():
        raise ConfigError(f"log.dir = {str(folder)!r}: {str(above)!r} is no folder; choose another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"log.dir = {str(folder)!r}: {str(above)!r} cannot be written; choose another folder")


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of runs in a folder, itself included, at any depth."""
    return sorted(found.parent for found in folder.rglob(RUN_FILE) if (found.parent / HISTORY_FILE).is_file())


class RunLocked(ConfigError):
    """Another process works on a run."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder inside this context.

    Raises:
        RunLocked: if another process holds it.
        ConfigError: if the folder cannot be written.
        OSError: if its disk is full.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder / LOCK_FILE))
        except Held as other:
            raise RunLocked(
                f"log.dir = {str(folder)!r}: process {other} works on this run; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise ConfigError(
                f"log.dir = {str(folder)!r}: {reason_of(error)}; make it writable, or copy it to another folder"
            ) from None
        yield


def read_run_file(folder: Path) -> dict[str, Any]:
    """Return the content of ``run.json``; an empty dictionary if the file is missing.

    Raises:
        ConfigError: if the file is damaged or cannot be read.
    """
    try:
        if not (folder / RUN_FILE).is_file():
            return {}
        content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        known_names = BELONGS_BY + DESCRIBED_BY
        belongs = {name: str(value) for name, value in content.get(ENVIRONMENT, {}).items() if name in known_names}
        preemptions = int(content.get("preemptions", 0))
        unsent = [str(name) for name in content.get(UNSENT, [])]
        known = {"id": str(content["id"]), "preemptions": preemptions, ENVIRONMENT: belongs, UNSENT: unsent}
        return known | ({PLACE: str(content[PLACE])} if PLACE in content else {})
    except OSError as error:
        raise ConfigError(f"log.dir = {str(folder)!r}: {error.strerror}; choose another folder") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"log.dir = {str(folder)!r}: its {RUN_FILE} is damaged; choose another folder") from None


def note_unsent(folder: Path, names: Sequence[str]) -> None:
    """Note in ``run.json`` what W&B has not got of a run."""
    known = read_run_file(folder)
    if known and known[UNSENT] != list(names):
        write_json(folder / RUN_FILE, known | {UNSENT: list(names)})


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's history; skip damaged lines, which a crash may leave, with a message."""
    file = folder / HISTORY_FILE
    rows: list[dict[str, Any]] = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            row = _parse_row(line)
            if row is None:
                print(f"{file}: skipped a damaged line", file=sys.stderr)
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
    """Return the figures of a row of history, without its step."""
    return {key: value for key, value in row.items() if key != STEP}


def picture_files(folder: Path, step: int) -> dict[str, Path]:
    """Return the image files of a step, by the names that they are logged under."""
    files = sorted((folder / SAMPLES).glob(f"*-{step:08d}.*"))
    return {file.name.removesuffix(f"-{step:08d}{file.suffix}"): file for file in files}


def best_figures(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the best value of each figure that has a goal, and the last value of every other figure."""
    figures: dict[str, float] = {}
    for row in history:
        for key, value in row.items():
            if key != STEP and (goal_of(key) is None or is_better(key, value, figures.get(key))):
                figures[key] = value
    return figures


class Held(Exception):
    """Another process holds the lock; the message is its process id, or ``unknown``."""


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold the lock of a file inside this context; the system releases it when the process ends in any way.

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


def belongs_here() -> dict[str, str]:
    """Return the environment variables that say where on W&B this process's run belongs, and describe it."""
    return {name: os.environ[name] for name in BELONGS_BY + DESCRIBED_BY if name in os.environ}


def place_of(folder: Path, run_id: str) -> tuple[str | None, str | None]:
    """Return the entity and the project in which W&B has the run of a folder; None for both if it has not."""
    run_file = read_run_file(folder)
    entity, _, project = run_file.get(PLACE, "").partition("/") if run_file.get("id") == run_id else ("", "", "")
    return (entity, project) if entity and project else (None, None)


def note_place(folder: Path, run_id: str, place: str | None, group: str | None = None) -> None:
    """Note in ``run.json`` where on W&B the run of a folder is.

    Args:
        folder: the run's folder.
        run_id: the run's id.
        place: ``ENTITY/PROJECT``; None: it is recorded offline.
        group: its group, if the environment does not name it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = read_run_file(folder)
    environment = known.get(ENVIRONMENT, {}) | ({"WANDB_RUN_GROUP": group} if group else {})
    added = {PLACE: place} if place else {}
    write_json(folder / RUN_FILE, known | {"id": run_id, ENVIRONMENT: environment} | added)


def folder_of(variable: str, folder: Path) -> Path:
    """Return the folder that an environment variable names, or else another one; make it.

    Raises:
        ConfigError: if it cannot be made.
    """
    path = Path(os.environ.get(variable) or folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{variable} = {str(path)!r}: {error.strerror}; name a folder that can be made") from None
    return path


@contextmanager
def environment_of(folder: Path) -> Iterator[None]:
    """Inside this context the environment says where on W&B the run of a folder belongs. It is undone afterwards.

    For a run that W&B has not seen, this process's environment decides what the run's own left open.

    Raises:
        ConfigError: if the folder's ``run.json`` is damaged.
    """
    run_file, before = read_run_file(folder), dict(os.environ)
    own, forgotten = run_file.get(ENVIRONMENT, {}), {"WANDB_SWEEP_ID"}
    if PLACE in run_file:
        own = {name: value for name, value in own.items() if name in BELONGS_BY}
        forgotten = {*BELONGS_BY, *DESCRIBED_BY}
    for name in forgotten - own.keys():
        os.environ.pop(name, None)
    os.environ.update(own | ({"WANDB_RUN_ID": run_file["id"]} if run_file else {}))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def write_run_files(config: BaseModel, folder: Path, run_id: str) -> None:
    """Write the run's id and its configuration to its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    known = read_run_file(folder)
    write_json(folder / RUN_FILE, known | {"id": run_id, ENVIRONMENT: known.get(ENVIRONMENT, {}) | belongs_here()})
    write_text(folder / CONFIG_FILE, to_yaml(config, without_secrets=True))


def mark_synced(folder: Path) -> None:
    """Make `wandb sync` skip the files of a run that is complete on W&B."""
    for file in (folder / "wandb").glob(f"*run-*-{read_run_file(folder).get('id')}/*.wandb"):
        file.with_name(file.name + SYNCED).touch()
