"""The results of a sweep: its trials, best first, as a table in the terminal and as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusion_core.config.ranking import judged, trial_order
from diffusion_core.files import write_csv, write_json
from diffusion_core.run_folder import SWEEP_RESULTS
from diffusion_core.search.front import Point, layers
from diffusion_core.search.objectives import Objective, front_among, goals_in_words, point_of
from diffusion_core.search.sweep import Sweep, SweepError
from diffusion_core.tables import cell, text_table

CSV_FILE = "results.csv"
JSON_FILE = SWEEP_RESULTS
FRONT_FILE = "front.json"
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
        front: whether it is on the Pareto front of several objectives; None for a sweep with one or none.
    """

    id: str
    state: str
    parameters: Mapping[str, Any]
    figures: Mapping[str, float]
    config: Mapping[str, Any] = field(default_factory=dict)
    best_checkpoint: str | None = None
    seconds: float | None = None
    queued: float | None = None
    front: bool | None = None


def measured(trials: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[Point | None]:
    """Return the objectives of each trial; None for one that failed, or lacks one of them."""
    return [point_of(judged(trial), objectives) for trial in trials]


def by_front(trials: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return trials with ``front`` set, in layers: those on the Pareto front, those that only they beat, and so on.

    Trials of one layer are sorted by the first objective. Trials that lack an objective come last, and of
    these the failed ones.
    """
    points = measured(trials, objectives)
    front = front_among(points, objectives).trials
    order = [*front, *(index for layer in layers(points, [each.goal for each in objectives]) for index in layer)]
    rest = sorted(range(len(trials)), key=lambda index: trial_order(trials[index], None, maximize=False))
    order = list(dict.fromkeys([*order, *rest]))
    return [replace(trials[index], front=index in front) for index in order]


def front_line(trials: Sequence[TrialRecord], objectives: Sequence[Objective]) -> str:
    """Return in one line how many trials are on the Pareto front, and the hypervolume that it dominates."""
    front = front_among(measured(trials, objectives), objectives)
    return (
        f"Pareto front of {goals_in_words(objectives)}: {len(front.trials)} of {len(trials)} trials; "
        f"hypervolume {front.volume:.6g}, measured from {', '.join(f'{value:.6g}' for value in front.reference)}"
    )


def table(trials: Sequence[TrialRecord], varied: Sequence[str], shown: Sequence[str] = ()) -> str:
    """Return a table of trials: rank, id, state, the varied knobs, and figures.

    Trials on a Pareto front have a star.

    Args:
        trials: in their order.
        varied: the knobs that differ between them.
        shown: the figures that come first: the sweep's objectives.
    """
    candidates = dict.fromkeys([*shown, *SHOWN_FIGURES])
    figures = [name for name in candidates if any(name in trial.figures for trial in trials)]
    queued = ["queued"] if any(trial.queued is not None for trial in trials) else []
    rows = [
        [
            f"{rank}*" if trial.front else str(rank),
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


def summary(sweep: Sweep, trials: Sequence[TrialRecord]) -> str:
    """Return a heading, the table of a sweep's trials, and with several objectives the line about its Pareto front.

    Args:
        sweep: the sweep.
        trials: in their order.
    """
    best = f", best {sweep.metric} first" if sweep.metric else ""
    lines = [
        f"{sweep.name}: {len(trials)} trials{', * on the Pareto front' if sweep.several else best}",
        table(trials, sweep.varied, [objective.name for objective in sweep.objectives]),
    ]
    return "\n".join([*lines, *([front_line(trials, sweep.objectives)] if sweep.several else [])])


def parameters_line(parameters: Mapping[str, Any], varied: Sequence[str]) -> str:
    """Return the varied knobs of a trial in one line: ``train.lr=0.0004213 seed=1``."""
    texts = {key: f"{value:.4g}" if isinstance(value := parameters[key], float) else value for key in varied}
    return " ".join(f"{key}={value}" for key, value in texts.items())


def write_results(folder: Path, trials: Sequence[TrialRecord], objectives: Sequence[Objective] = ()) -> None:
    """Write ``results.csv`` (a row per trial) and ``results.json`` (the same, nested) into a folder.

    With several objectives, trials on the Pareto front are marked, and ``front.json`` has their ids, the hypervolume,
    and the values that it is measured from.

    Raises:
        SweepError: if the file system refuses, for example because it is full.
    """
    try:
        _write_results(folder, trials, objectives)
    except OSError as error:
        raise SweepError(f"{str(folder)!r}: {error.strerror}; free some space, then repeat the command") from None


def _write_results(folder: Path, trials: Sequence[TrialRecord], objectives: Sequence[Objective]) -> None:
    several = len(objectives) > 1
    nested = [asdict(trial) for trial in trials]
    if not several:
        for entry in nested:
            del entry["front"]
    write_json(folder / JSON_FILE, nested)
    if several:
        front = front_among(measured(trials, objectives), objectives)
        content = {
            "objectives": [asdict(objective) for objective in objectives],
            "trials": [trials[index].id for index in front.trials],
            "hypervolume": front.volume,
            "reference": [None if math.isnan(value) else value for value in front.reference],
        }
        write_json(folder / FRONT_FILE, content)
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
            **({} if trial.front is None else {"front": trial.front}),
            **trial.figures,
            **(trial.config or trial.parameters),
        }
        columns |= dict.fromkeys(row)
        rows.append(row)
    write_csv(folder / CSV_FILE, list(columns), rows)
