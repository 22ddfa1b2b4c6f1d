"""Which trial of a sweep is the best: one answer of the terminal, the files, the report and the commands."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stub_sweep import stub_content

from agent.sweep.file import check_sweep
from agent.sweep.offline import offline_sweep
from diffusion_core.checkpoint import CheckpointError, write_checkpoint
from diffusion_core.choice import best_of_sweep
from diffusion_core.machine.jobs import Outcome
from diffusion_core.report.contents import ranking
from diffusion_core.report.findings import candidates
from diffusion_core.report.folders import read_study
from diffusion_core.report.words import headline
from diffusion_core.runs.result import stored_result
from diffusion_core.search.objectives import Objective
from diffusion_core.search.offline import OfflineSweep
from diffusion_core.search.results import TrialRecord, by_front, write_results

STEPS = 3
LOSSES = [0.1 + 1 / STEPS, 0.2 + 1 / STEPS, 0.3 + 1 / STEPS]
"""Losses of the trials: the first one has measured the least."""


def load(folder: Path) -> OfflineSweep:
    return offline_sweep(check_sweep(stub_content(STEPS, [0.1, 0.2, 0.3]), "mine.yaml", "mine"), folder)


def sweep_in(folder: Path, *states: str, checkpoint: bool = True) -> OfflineSweep:
    """A sweep whose trials are in some states, with what these leave: a result, if they finished, and a checkpoint."""
    done = load(folder)
    done.run()
    for place, (trial, state) in enumerate(zip(done.state.trials, states, strict=True)):
        run, trial.state = done.state.trial_folder(trial), state
        file, best = run / "result.json", {"metric": "val/loss", "value": LOSSES[place], "step": STEPS}
        metadata = {"config": {}, "image_shape": [1, 8, 8], "num_classes": 10, "class_names": [], "structure": {},
                    "ema_updates": 0, "extra": {}, "figures": {}, "best": best}  # fmt: skip
        if checkpoint or place:
            written = write_checkpoint(run / "checkpoints", STEPS, metadata, {"ema": {"w": torch.zeros(1)}})
            file.write_text(json.dumps(json.loads(file.read_text()) | {"best_checkpoint": str(written.path)}))
        if state != "finished":
            file.unlink()
    done.state.write()
    found = load(folder)
    write_results(folder, found.reader.ranked())
    return found


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stub trials note what they do."""
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("STUB_NOTES", str(tmp_path / "notes"))


@pytest.mark.parametrize(
    ("states", "order"),
    [
        (("finished", "finished", "finished"), [0, 1, 2]),
        (("stopped", "finished", "finished"), [0, 1, 2]),
        (("failed", "finished", "finished"), [1, 2, 0]),
        (("failed", "finished", "stopped"), [1, 2, 0]),
        (("waiting", "finished", "finished"), [1, 2, 0]),
        (("failed", "waiting", "finished"), [2, 1, 0]),
    ],
)
def test_all_name_the_same_best_trial(states: tuple[str, ...], order: list[int], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    found = sweep_in(folder, *states)
    trials = found.state.trials
    ids = [trials[index].id for index in order]
    assert [record.id for record in found.reader.ranked()] == ids
    rows = json.loads((folder / "results.json").read_text())
    assert [row["id"] for row in rows] == ids
    study = read_study([folder])
    assert [study.trials[index].name for index in ranking(study)] == ids
    assert candidates(study)[0].best.name == ids[0]
    best = best_of_sweep(folder)
    assert best == folder / "trials" / ids[0]
    assert rows[0]["best_checkpoint"] == str(best / "checkpoints" / f"step-{STEPS:08d}")


@pytest.mark.parametrize(("state", "said"), [("failed", "rank 1 of 2"), ("stopped", "rank 2 of 3")])
def test_a_failed_trial_has_no_rank_and_reaches_no_target(
    state: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sweep_in(tmp_path / "sweep", state, "finished", "finished")
    found.progress.ended(found.state.trials[1], Outcome(0), [], None)
    assert said in capsys.readouterr().out
    assert found.reader.reached(LOSSES[0]) == (state == "stopped")
    assert found.reader.reached(LOSSES[1])


def test_where_all_trials_failed_none_is_the_best(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    found = sweep_in(folder, *["failed"] * 3)
    assert [record.id for record in found.reader.ranked()] == [trial.id for trial in found.state.trials]
    study = read_study([folder])
    assert candidates(study) == []
    assert headline(study, None) == "All trials failed, so none is the best."
    with pytest.raises(CheckpointError, match="no finished trial"):
        best_of_sweep(folder)


def test_a_better_trial_without_a_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = sweep_in(tmp_path / "sweep", "stopped", "finished", "finished", checkpoint=False)
    first, second, _ = found.state.trials
    assert best_of_sweep(tmp_path / "sweep").name == second.id
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"sweep': no checkpoint of {first.id}, which results.json puts first")


def test_failed_trials_come_last_of_several_objectives_too() -> None:
    one = TrialRecord("failed", "failed", {}, {"val/loss": 0.1, "sample/macs": 1.0})
    trials = [one, replace(one, id="bare", state="finished", figures={}), replace(one, id="good", state="finished")]
    objectives = [Objective("val/loss", "minimize"), Objective("sample/macs", "minimize")]
    assert [(record.id, record.front) for record in by_front(trials, objectives)] == [
        ("good", True), ("bare", False), ("failed", False),
    ]  # fmt: skip


def test_the_best_checkpoint_of_a_lottery_is_that_of_its_last_round_wherever_the_sweep_is(tmp_path: Path) -> None:
    was, folder = tmp_path / "was", tmp_path / "moved"
    found = sweep_in(was, "finished", "finished", "finished")
    trial = was / "trials" / found.state.trials[0].id
    place = Path("rounds") / "01" / "checkpoints" / "step-00000003"
    (trial / place).mkdir(parents=True)
    shutil.rmtree(trial / "checkpoints", ignore_errors=True)
    result = json.loads((trial / "result.json").read_text()) | {"best_checkpoint": str(trial / place)}
    (trial / "result.json").write_text(json.dumps(result))
    write_results(was, load(was).reader.ranked())
    was.rename(folder)
    (row, *_) = json.loads((folder / "results.json").read_text())
    assert row["best_checkpoint"] == str(trial / place)
    trial = folder / "trials" / trial.name
    assert best_of_sweep(folder) == trial / "rounds" / "01"
    stored = stored_result(trial)
    assert stored is not None
    assert stored["best_checkpoint"] == str(trial / place)
