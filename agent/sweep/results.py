"""What a sweep came to: a table of its trials, best first, on the screen and in files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config.metrics import is_better
from diffusion_core.files import write_json

CSV_FILE = "results.csv"
JSON_FILE = "results.json"
SHOWN_FIGURES = ("val/loss", "eval/class_agreement", "prune/sparsity", "model/nonzero_params", "model/macs")


@dataclass(frozen=True)
class TrialRecord:
    """One line of the results.

    Attributes:
        id: the trial's run id.
        state: ``finished``, ``stopped`` (by early termination), ``failed``, or what it is in the middle of.
        parameters: what the sweep chose for it.
        figures: the best value of each figure with a goal, the last of the others.
        config: every knob.
        best_checkpoint: folder of its best checkpoint, or None.
        seconds: wall time, or None.
    """

    id: str
    state: str
    parameters: Mapping[str, Any]
    figures: Mapping[str, float]
    config: Mapping[str, Any] = field(default_factory=dict)
    best_checkpoint: str | None = None
    seconds: float | None = None


def best_first(trials: Sequence[TrialRecord], metric: str | None) -> list[TrialRecord]:
    """Trials in order of the sweep's metric; those without it come last, in the order in which they ran."""
    if metric is None:
        return list(trials)
    measured = [trial for trial in trials if metric in trial.figures]
    ordered: list[TrialRecord] = []
    for trial in measured:
        value = trial.figures[metric]
        place = next((i for i, other in enumerate(ordered) if is_better(metric, value, other.figures[metric])), None)
        ordered.insert(len(ordered) if place is None else place, trial)
    return ordered + [trial for trial in trials if metric not in trial.figures]


def table(trials: Sequence[TrialRecord], varied: Sequence[str], metric: str | None = None) -> str:
    """Trials as text: rank, id, state, what varied, figures (the sweep's metric among them)."""
    candidates = dict.fromkeys([*([metric] if metric else []), *SHOWN_FIGURES])
    figures = [name for name in candidates if any(name in trial.figures for trial in trials)]
    rows = [["", "trial", "state", *varied, *figures, "seconds"]]
    for rank, trial in enumerate(trials, start=1):
        rows.append(
            [
                str(rank),
                trial.id,
                trial.state,
                *(shown(trial.parameters.get(key)) for key in varied),
                *(shown(trial.figures.get(name)) for name in figures),
                shown(trial.seconds and round(trial.seconds)),
            ]
        )
    return table_of(rows)


def table_of(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns, a line below the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def choice(parameters: Mapping[str, Any], varied: Sequence[str]) -> str:
    """What a sweep chose for a trial: ``train.lr=0.0004213 seed=1``."""
    shown = {key: f"{value:.4g}" if isinstance(value := parameters[key], float) else value for key in varied}
    return " ".join(f"{key}={value}" for key, value in shown.items())


def duration(seconds: float) -> str:
    """A length of time in words: ``34 s``, ``5 min``, ``7.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def shown(value: Any) -> str:
    """A cell: numbers in few digits, what is not known as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def write_results(folder: Path, trials: Sequence[TrialRecord]) -> None:
    """Write ``results.csv`` (a row per trial) and ``results.json`` (the same, nested) into a folder."""
    write_json(folder / JSON_FILE, [asdict(trial) for trial in trials])
    columns: dict[str, None] = dict.fromkeys(["rank", "id", "state", "seconds", "best_checkpoint"])
    rows = []
    for rank, trial in enumerate(trials, start=1):
        row = {
            "rank": rank,
            "id": trial.id,
            "state": trial.state,
            "seconds": trial.seconds,
            "best_checkpoint": trial.best_checkpoint,
            **trial.figures,
            **(trial.config or trial.parameters),
        }
        columns |= dict.fromkeys(row)
        rows.append(row)
    with (folder / CSV_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def best_of_sweep(folder: Path) -> Path:
    """The best checkpoint of the best trial of an offline sweep."""
    try:
        trials = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        return Path(next(trial["best_checkpoint"] for trial in trials if trial["best_checkpoint"]))
    except (OSError, ValueError, StopIteration, KeyError, TypeError):
        raise CheckpointError(f"--sweep = {str(folder)!r}: no finished trial in its {JSON_FILE}") from None
