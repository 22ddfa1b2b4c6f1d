"""Sweeps with several objectives: run to their end, killed, and shown as a Pareto front."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.report import study_of
from agent.sweep import __main__ as command
from agent.sweep.file import SweepFile, check_sweep
from agent.sweep.offline import offline_sweep, run_offline
from diffusion_core.report.page import render, write_page
from diffusion_core.search import offline

STUB = Path(__file__).parents[2] / "stub_trial.py"
OBJECTIVES = [
    {"name": "val/loss", "goal": "minimize", "limit": 1.2},
    {"name": "sample/macs", "goal": "minimize", "limit": 9000},
]
TRIALS = 20
PATIENCE_S = 300.0


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stub trials note what they do."""
    folder = tmp_path / "notes"
    folder.mkdir()
    monkeypatch.setenv("STUB_NOTES", str(folder))
    monkeypatch.setattr(offline, "POLL_SECONDS", 0.01)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return folder


def content(**more: Any) -> dict[str, Any]:
    return {
        "method": "tpe",
        "metrics": OBJECTIVES,
        "run_cap": TRIALS,
        "command": ["${interpreter}", "-S", str(STUB), "${args}"],
        "parameters": {
            "preset": {"value": "digits"},
            "train.steps": {"value": 3},
            "train.warmup_steps": {"value": 0},
            "seed": {"value": 0},
            "train.lr": {"min": 0.01, "max": 0.9, "distribution": "log_uniform_values"},
            "sample.steps": {"min": 1, "max": 12},
        },
        **more,
    }


def sweep_of(**more: Any) -> SweepFile:
    return check_sweep(content(**more), "stub.yaml", "stub")


def expected_front(trials: Sequence[dict[str, Any]]) -> tuple[set[str], float]:
    """The front within the limits, by comparing all pairs, and its area, by the staircase of two objectives."""
    loss_limit, macs_limit = (float(str(each["limit"])) for each in OBJECTIVES)
    places = {each["id"]: (each["figures"]["val/loss"], each["figures"]["sample/macs"]) for each in trials}
    places = {name: place for name, place in places.items() if place[0] <= loss_limit and place[1] <= macs_limit}
    front = {
        name
        for name, one in places.items()
        if not any(other[0] <= one[0] and other[1] <= one[1] and other != one for other in places.values())
    }
    area, ceiling = 0.0, loss_limit
    for loss, macs in sorted((places[name] for name in front), key=lambda place: place[1]):
        area += (ceiling - loss) * (macs_limit - macs)
        ceiling = min(ceiling, loss)
    return front, area


def test_twenty_trials_killed_once_end_in_a_front(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, folder = sweep_of(), tmp_path / "out"
    monkeypatch.setenv("STUB_HOLD", "9")

    def run() -> None:
        os.setsid()
        sys.exit(run_offline(offline_sweep(loaded, folder, 2), None))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    deadline = time.monotonic() + PATIENCE_S
    while len(list(notes.glob("*.jsonl"))) < 10:
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join(PATIENCE_S)
    before = json.loads((folder / "sweep.json").read_text())["trials"]
    monkeypatch.delenv("STUB_HOLD")
    assert run_offline(offline_sweep(loaded, folder, 2), None) == 0

    trials = json.loads((folder / "results.json").read_text())
    assert len(trials) == len(list(notes.glob("*.jsonl"))) == TRIALS
    assert {trial["id"] for trial in before} <= {trial["id"] for trial in trials}
    for path in notes.glob("*.jsonl"):
        steps = [event["step"] for line in path.read_text().splitlines() if (event := json.loads(line)).get("step")]
        assert steps == [1, 2, 3], "no step was done twice or left out"

    front, area = expected_front(trials)
    assert {trial["id"] for trial in trials if trial["front"]} == front
    assert [trial["front"] for trial in trials[: len(front)]] == [True] * len(front), "those on the front come first"
    losses = [trial["figures"]["val/loss"] for trial in trials[: len(front)]]
    assert losses == sorted(losses)
    summary = json.loads((folder / "front.json").read_text())
    assert set(summary["trials"]) == front
    assert summary["hypervolume"] == pytest.approx(area)
    assert summary["reference"] == [1.2, 9000]

    said = capsys.readouterr().out
    assert f"stub: {TRIALS} trials, * on the Pareto front" in said
    assert f"Pareto front of val/loss (minimize) and sample/macs (minimize): {len(front)} of {TRIALS} trials" in said
    assert f"hypervolume {area:.6g}, measured from 1.2, 9000" in said
    assert "1*" in said
    assert f"{TRIALS}*" not in said
    assert "on the front" in said

    study = study_of([str(folder)])
    page = render(study)
    table = page.partition('<section id="pareto"')[2].partition("</section>")[0]
    assert {name for name in (trial["id"] for trial in trials) if f'data-trial="{name}"' in table} == front
    assert f"{len(front)} of {TRIALS} trials are on the Pareto front" in page
    assert f"a hypervolume of {area:.6g}" in page
    write_page(study, tmp_path / "report.md", markdown=True)
    text = (tmp_path / "report.md").read_text()
    table = text.partition("## Pareto front")[2].partition("## ")[0]
    assert {name for name in (trial["id"] for trial in trials) if name in table} == front
    assert (tmp_path / "report-front.png").is_file()


def test_one_objective_marks_no_front(tmp_path: Path) -> None:
    alone = {"metric": {"name": "val/loss", "goal": "minimize"}, "metrics": None, "run_cap": 3}
    offline_sweep(sweep_of(**alone), tmp_path / "out").run()
    trials = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [trial["figures"]["val/loss"] for trial in trials] == sorted(t["figures"]["val/loss"] for t in trials)
    assert not any("front" in trial for trial in trials)
    assert not (tmp_path / "out" / "front.json").exists()
    assert study_of([str(tmp_path / "out")]).objectives == ()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "error: metrics: not known to W&B's server; add --offline"),
        (
            {"metrics": None, "metric": {"name": "val/loss", "goal": "minimize"}},
            "error: method = 'tpe': not known to W&B's server; add --offline",
        ),
    ],
)
def test_on_a_server_it_is_refused_in_one_line(
    more: dict[str, Any],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in content(**more).items() if value is not None}))
    assert command.main([str(file), "--agents", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "sweep.yaml"]


def test_a_dry_run_writes_no_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content()))
    assert command.main(["sweep.yaml", "--offline", "--dry-run", "--count", "2"]) == 0
    assert capsys.readouterr().out.count("sample.steps=") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "sweep.yaml"]
