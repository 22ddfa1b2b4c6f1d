"""What a sweep makes of the folders of its trials: damaged results, full disks, folders that have moved, times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from stub_sweep import stub_content

from agent.sweep.file import check_sweep
from agent.sweep.offline import offline_sweep
from diffusion_core.search.offline import OfflineSweep

STEPS = 3


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stub trials note what they do."""
    folder = tmp_path / "notes"
    folder.mkdir()
    monkeypatch.setenv("STUB_NOTES", str(folder))
    return folder


def sweep_in(folder: Path, rates: Sequence[float] = (0.3, 0.2)) -> OfflineSweep:
    return offline_sweep(check_sweep(stub_content(STEPS, rates), "mine.yaml", "mine"), folder)


def events(notes: Path, trial: str) -> list[str]:
    return [json.loads(line)["event"] for line in (notes / f"{trial}.jsonl").read_text().splitlines()]


DAMAGED = ["", '{"figures": {"val/', "[]", "null", '{"figures": 3}', '{"config": [1]}', "\0", "[" * 100_000]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("state", ["finished", "running"])
def test_a_trial_with_a_damaged_result_goes_on_and_the_others_are_left_alone(
    content: str, state: str, tmp_path: Path, notes: Path
) -> None:
    first = sweep_in(tmp_path / "sweep")
    records = first.run()
    one, other = first.state.trials
    (first.state.trial_folder(one) / "result.json").write_text(content)
    one.state = state
    first.state.write()
    again = sweep_in(tmp_path / "sweep")
    assert [replace(record, seconds=None) for record in again.run()] == [replace(one, seconds=None) for one in records]
    assert events(notes, one.id) == ["start", *["step"] * STEPS, "end", "start", "end"]
    assert events(notes, other.id) == ["start", *["step"] * STEPS, "end"]


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_the_damaged_result_of_a_trial_that_did_not_finish_is_ignored(
    state: str, tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sweep_in(tmp_path / "sweep")
    first.run()
    one, _ = first.state.trials
    file = first.state.trial_folder(one) / "result.json"
    file.write_text("{")
    one.state = state
    first.state.write()
    records = sweep_in(tmp_path / "sweep").run()
    assert {record.id: record.state for record in records}[one.id] == state
    assert [record.figures["val/loss"] for record in records] == pytest.approx([0.2 + 1 / STEPS, 0.3 + 1 / STEPS])
    assert events(notes, one.id).count("start") == 1
    assert f"{file}: ignored, it is damaged" in capsys.readouterr().err
