"""The results of a sweep: its trials, best first, as a table in the terminal and as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffusion_core.files import write_csv, write_json
from diffusion_core.run_folder import SWEEP_RESULTS
from diffusion_core.tables import cell, text_table

CSV_FILE = "results.csv"
JSON_FILE = SWEEP_RESULTS
SHOWN_FIGURES = ("val/loss", "eval/class_agreement", "prune/sparsity", "model/nonzero_params", "model/macs")


@dataclass(frozen=True)
class TrialRecord:
    """The result of a trial.

    Attributes:
        id: the trial's run id.
        state: ``finished``, ``stopped`` (by early termination), ``failed``, or the state of a trial that goes on.
        parameters: the knobs that the sweep chose for it.
        figures: the best value of each figure that has a goal, and the last value of every other figure.
        config: every knob.
        best_checkpoint: the folder of its best checkpoint, or None.
        seconds: wall time, or None.
        queued: seconds that its jobs waited in a cluster's queue, or None.
    """

    id: str
    state: str
    parameters: Mapping[str, Any]
    figures: Mapping[str, float]
    config: Mapping[str, Any] = field(default_factory=dict)
    best_checkpoint: str | None = None
    seconds: float | None = None
    queued: float | None = None


def table(trials: Sequence[TrialRecord], varied: Sequence[str], metric: str | None = None) -> str:
    """Return a table of trials: rank, id, state, the varied knobs, and figures, first the sweep's metric."""
    candidates = dict.fromkeys([*([metric] if metric else []), *SHOWN_FIGURES])
    figures = [name for name in candidates if any(name in trial.figures for trial in trials)]
    queued = ["queued"] if any(trial.queued is not None for trial in trials) else []
    rows = [
        [
            str(rank),
            trial.id,
            trial.state,
            *(cell(trial.parameters.get(key)) for key in varied),
            *(cell(trial.figures.get(name)) for name in figures),
            cell(trial.seconds and round(trial.seconds)),
            *(cell(trial.queued and round(trial.queued)) for _ in queued),
        ]
        for rank, trial in enumerate(trials, start=1)
    ]
    return text_table(["", "trial", "state", *varied, *figures, "seconds", *queued], rows, keys=2)


def parameters_line(parameters: Mapping[str, Any], varied: Sequence[str]) -> str:
    """Return the varied knobs of a trial in one line: ``train.lr=0.0004213 seed=1``."""
    texts = {key: f"{value:.4g}" if isinstance(value := parameters[key], float) else value for key in varied}
    return " ".join(f"{key}={value}" for key, value in texts.items())


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
            **({} if trial.queued is None else {"queued": trial.queued}),
            **trial.figures,
            **(trial.config or trial.parameters),
        }
        columns |= dict.fromkeys(row)
        rows.append(row)
    write_csv(folder / CSV_FILE, list(columns), rows)
