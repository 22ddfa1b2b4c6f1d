"""The result of a trial, and its file ``result.json`` in the run's folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_core.files import write_json
from diffusion_core.redact import redacted
from diffusion_core.run_folder import CHECKPOINTS, RESULT_FILE, ROUNDS

DAMAGED = "{}: ignored, it is damaged"


@dataclass(frozen=True)
class TrialResult:
    """The result of a finished trial.

    Attributes:
        run_id: the run's id.
        step: optimizer steps done.
        figures: the best value of each figure that has a goal, the last value of all others, and the model's costs.
        best_checkpoint: folder of the best checkpoint.
        seconds: wall time of this process's part of the trial.
    """

    run_id: str
    step: int
    figures: dict[str, float]
    best_checkpoint: Path
    seconds: float


def write_result(folder: Path, result: TrialResult, config: Mapping[str, Any]) -> None:
    """Write a result, and the configuration by dotted key, to a run's folder."""
    described = asdict(result) | {"best_checkpoint": str(result.best_checkpoint), "config": dict(config)}
    write_json(folder / RESULT_FILE, redacted(described))


def stored_result(folder: Path) -> dict[str, Any] | None:
    """Read what a run's folder holds of its result, which any program may have written. None if there is no result.

    The folder may have been moved or copied: a checkpoint of the run is looked up in it, one of a lottery in that of
    its round. Figures that are no numbers are left out. A damaged file counts as none.
    """
    file = folder / RESULT_FILE
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        figures = dict(stored.get("figures") or {})
        best, config = stored.get("best_checkpoint"), dict(stored.get("config") or {})
        if best is not None and Path(best).parent.name == CHECKPOINTS:
            best = str(folder.joinpath(*Path(best).parts[-4 if (folder / ROUNDS).is_dir() else -2 :]))
        found = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        return stored | {"figures": found, "config": config, "best_checkpoint": best}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        print(DAMAGED.format(file), file=sys.stderr)
        return None


def read_result(folder: Path) -> tuple[TrialResult, dict[str, Any]] | None:
    """Read the result and the configuration, by dotted key, from a run's folder. None if there is no result.

    The folder may have been moved: the best checkpoint is looked up in it. A damaged file counts as none.
    """
    stored = stored_result(folder)
    if stored is None:
        return None
    try:
        best, seconds = Path(stored["best_checkpoint"]), stored["seconds"]
        result = TrialResult(stored["run_id"], int(stored["step"]), stored["figures"], best, seconds)
        return result, stored["config"]
    except (ValueError, KeyError, TypeError):
        print(DAMAGED.format(folder / RESULT_FILE), file=sys.stderr)
        return None
