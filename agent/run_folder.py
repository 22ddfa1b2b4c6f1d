"""The folder of a run: what is in it, and how to read it back.

runs/ID/
    run.json              the W&B run id
    data.json             which images: names, counts, a hash
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_core.config_io import ConfigError
from diffusion_core.figure_names import goal_of, is_better
from diffusion_core.tracking import STEP

RUN_FILE = "run.json"
DATA_FILE = "data.json"
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
    if run_id is None and (folder / RUN_FILE).is_file():
        try:
            run_id = str(json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["id"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"log.dir = {configured!r}: its {RUN_FILE} is damaged; choose another folder") from None
    return run_id or secrets.token_hex(4), folder


def make_folder(folder: Path) -> None:
    """Make a run's folder.

    Raises:
        ConfigError: if that is impossible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"log.dir = {str(folder)!r}: {error.strerror}; choose another folder") from None


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
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                print(f"{file}: passing over a damaged line", file=sys.stderr)
    return rows


def best_figures(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure its best value, if it has a goal, else its last."""
    figures: dict[str, float] = {}
    for row in history:
        for key, value in row.items():
            if key != STEP and (goal_of(key) is None or is_better(key, value, figures.get(key))):
                figures[key] = value
    return figures
