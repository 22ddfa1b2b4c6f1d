"""What is told of a sweep: the table and the files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from diffusion_core.config.metrics import best_first
from diffusion_core.messages import duration
from diffusion_core.search.results import TrialRecord, table, write_results

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
