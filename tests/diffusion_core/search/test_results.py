"""What is told of a sweep: the table and the files."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from diffusion_core.checkpoint import write_checkpoint
from diffusion_core.config.metrics import best_first
from diffusion_core.messages import duration
from diffusion_core.search.macros import TrialCommand
from diffusion_core.search.objectives import Objective, point_of
from diffusion_core.search.results import TrialRecord, table, write_results
from diffusion_core.search.state import SweepState, Trial
from diffusion_core.search.sweep import Sweep
from diffusion_core.search.trials import TrialReader

METRIC = "eval/class_agreement"


def trial(number: int, value: float | None, state: str = "finished") -> TrialRecord:
    parameters = {"train.lr": 10.0**-number, "model.channel_multipliers": [1, 2 + 2 * (number % 2)], "preset": "digits"}
    return TrialRecord(f"t{number}", state, parameters, {} if value is None else {METRIC: value}, seconds=60.0 * number)


TRIALS = [trial(1, 0.2, "stopped"), trial(2, 0.9), trial(3, None, "failed"), trial(4, 0.7), trial(1, math.nan)]


def test_the_best_come_first_and_what_was_not_measured_last() -> None:
    ranked = best_first(TRIALS[:4], METRIC, lambda trial: trial.figures)
    assert [record.id for record in ranked] == ["t2", "t4", "t1", "t3"]
    unordered = best_first(TRIALS[:4], None, lambda trial: trial.figures)
    assert [record.id for record in unordered] == ["t1", "t2", "t3", "t4"]
    lines = table(ranked, ["train.lr"], METRIC).splitlines()
    assert lines[0].split() == ["trial", "state", "train.lr", METRIC, "seconds"]
    assert lines[2].split() == ["1", "t2", "finished", "0.01", "0.9", "120"]
    assert lines[5].split() == ["4", "t3", "failed", "0.001", "-", "180"]


def test_the_files_hold_every_trial_in_that_order(tmp_path: Path) -> None:
    ranked = best_first(TRIALS[:4], METRIC, lambda trial: trial.figures)
    write_results(tmp_path, ranked)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [row["id"] for row in json.loads((tmp_path / "results.json").read_text())]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[0][METRIC]) == 0.9


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (34.4, "34 s"), (99, "99 s"), (300, "5 min"), (5999, "100 min"), (27000, "7.5 h")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


LOSS, AGREEMENT, MACS = (
    Objective("val/loss", "minimize"), Objective(METRIC, "maximize"), Objective("sample/macs", "minimize")
)  # fmt: skip
ROWS = [{"step": 10, "val/loss": 0.3, METRIC: 0.9}, {"step": 20, "val/loss": 0.1, METRIC: 0.6}]
"""No checkpoint has the best of both."""


@pytest.mark.parametrize("state", ["finished", "stopped"])
@pytest.mark.parametrize(("objectives", "rows", "best", "deleted", "point"), [
    ((LOSS, AGREEMENT, MACS), ROWS, 10, False, [0.3, 0.9, 7.0]),
    ((LOSS, AGREEMENT, MACS), ROWS, 20, False, [0.1, 0.6, 7.0]),
    ((LOSS, AGREEMENT, MACS), ROWS, 10, True, [0.3, 0.9, 7.0]),
    # As always: nothing was measured as the best, the best has only one of them, or there is only one to measure.
    ((LOSS, AGREEMENT, MACS), ROWS, None, False, [0.1, 0.9, 7.0]),
    ((LOSS, AGREEMENT, MACS), [{"step": 10, "val/loss": 0.3}, ROWS[0] | {"step": 20}], 10, False, [0.3, 0.9, 7.0]),
    ((LOSS, MACS), ROWS, 10, False, [0.1, 7.0]),
    ((AGREEMENT,), ROWS, 20, False, [0.9]),
])  # fmt: skip
def test_several_figures_of_quality_are_those_of_one_checkpoint(
    state: str, objectives: tuple[Objective, ...], rows: list[dict[str, float]], best: int | None, deleted: bool,
    point: list[float], tmp_path: Path,
) -> None:  # fmt: skip
    sweep_state = SweepState(Sweep("s", {}, {}, TrialCommand()), tmp_path)
    sweep_state.trials.append(Trial("t", {}, state))
    folder = sweep_state.trial_folder(sweep_state.trials[0])
    metadata = {"config": {}, "image_shape": [1, 8, 8], "num_classes": 10, "class_names": [], "structure": {},
                "ema_updates": 0, "extra": {},
                "best": best and {"metric": METRIC, "value": 0.5, "step": best}}  # fmt: skip
    for row in rows:
        figures = {name: value for name, value in row.items() if name != "step"}
        written = write_checkpoint(folder / "checkpoints", int(row["step"]), metadata | {"figures": figures},
                                   {"ema": {"w": torch.zeros(1)}})  # fmt: skip
        if deleted and row["step"] == best:
            shutil.rmtree(written.path)
    (folder / "history.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (*rows, {"step": 20, MACS.name: 7}))
    )
    if state == "finished":
        named = None if best is None else f"moved/checkpoints/step-{best:08d}"
        values = {"val/loss": min(row["val/loss"] for row in rows), METRIC: 0.9, MACS.name: 7.0}
        (folder / "result.json").write_text(json.dumps({"figures": values, "best_checkpoint": named}))
    reader = TrialReader(sweep_state, "val/loss", objectives)
    assert point_of(reader.records()[0].figures, objectives) == point
    assert point_of(reader.engine_runs()[0].summary_metrics, objectives) == point, "what a search learns from"
