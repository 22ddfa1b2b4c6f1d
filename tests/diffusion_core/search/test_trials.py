"""What a sweep makes of the folders of its trials: damaged results, full disks, folders that have moved, times."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stub_sweep import stub_content

from agent.sweep import offline as agent_offline
from agent.sweep.file import check_sweep
from agent.sweep.offline import offline_sweep, run_offline
from diffusion_core.search.offline import OfflineSweep
from diffusion_core.search.sweep import SweepError

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


@pytest.mark.parametrize(
    ("state", "gone", "runs_again"),
    [
        ("finished", "", True),
        ("finished", "result.json", True),
        ("finished", "history.jsonl", False),
        ("stopped", "", True),
        ("stopped", "result.json", False),
        ("failed", "", False),
    ],
)
def test_a_trial_that_has_lost_what_it_measured_runs_again(
    state: str, gone: str, runs_again: bool, tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sweep_in(tmp_path / "sweep")
    before = {record.id: record for record in first.run()}
    one, other = first.state.trials
    one.state = state
    first.state.write()
    lost = first.state.trial_folder(one) / gone
    (first.state.trial_folder(one) / "run.json").write_text("{}")
    shutil.move(lost, tmp_path / "moved")
    capsys.readouterr()
    after = {record.id: record for record in sweep_in(tmp_path / "sweep").run()}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == runs_again
    assert all(line.startswith(f"{one.id}: {str(lost)!r} is gone, so it ") for line in said)
    assert events(notes, one.id).count("start") == 1 + runs_again
    assert events(notes, other.id).count("start") == 1
    if runs_again:
        assert replace(after[one.id], seconds=None) == replace(before[one.id], seconds=None)


def test_a_command_that_writes_no_result_is_not_run_again(tmp_path: Path, notes: Path) -> None:
    first = sweep_in(tmp_path / "sweep")
    first.run()
    for trial in first.state.trials:
        (first.state.trial_folder(trial) / "result.json").unlink()
    sweep_in(tmp_path / "sweep").run()
    assert all(events(notes, trial.id).count("start") == 1 for trial in first.state.trials)


PICTURES = b"GIF" + bytes(range(256)) * 1000
WITH_PICTURES = """\
ulimit -S -f unlimited
"$@"
for word in "$@"; do case $word in --log.dir=*) folder=${word#*=};; esac; done
mkdir -p "$folder/samples"
cp "$STUB_PICTURE" "$folder/samples/diffusion-00000003.gif"
"""
fork = multiprocessing.get_context("fork")


def limited(coordinator: OfflineSweep, limit: int | None) -> int | None:
    """Run a sweep in a process none of whose files may grow beyond a limit, as on a full disk. Return its status."""

    def run() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            sys.exit(run_offline(coordinator, None))
        except SweepError as error:
            sys.exit(f"error: {error}")

    process = fork.Process(target=run)
    process.start()
    process.join(300)
    return process.exitcode


def stored(folder: Path) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())["trials"]
    return trials


def test_pictures_that_a_full_disk_refuses_are_copied_when_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agent_offline, "write_ended", lambda *arguments, **options: None)
    monkeypatch.setenv("STUB_PICTURE", str(tmp_path / "picture"))
    (tmp_path / "picture").write_bytes(PICTURES)
    (tmp_path / "with_pictures.sh").write_text(WITH_PICTURES)
    content = stub_content(STEPS, [0.3, 0.2])
    content["command"] = ["/bin/bash", str(tmp_path / "with_pictures.sh"), *content["command"]]
    folder = tmp_path / "sweep"

    def coordinator() -> OfflineSweep:
        return offline_sweep(check_sweep(content, "mine.yaml", "mine"), folder)

    for _ in range(2):
        assert limited(coordinator(), 100_000) == 1
        said = capfd.readouterr().err.splitlines()
        assert said[-1] == f"error: {str(folder)!r}: the disk is full; free some space, then repeat the command"
        (trial,) = stored(folder)
        assert (trial["state"], trial["failures"]) == ("finished", 0)
        assert not [*folder.glob("*.gif"), *folder.glob(".*.partial")]
    assert limited(coordinator(), None) == 0
    pictures = sorted(folder.glob("*.gif"))
    assert [path.name for path in pictures] == [f"{trial['id']}-diffusion.gif" for trial in stored(folder)]
    assert all(path.read_bytes() == PICTURES for path in pictures)
    # What an earlier version left unfinished is copied again, and what is there is not.
    pictures[0].write_bytes(PICTURES[:1000])
    before = pictures[1].stat()
    assert limited(coordinator(), None) == 0
    assert pictures[0].read_bytes() == PICTURES
    assert pictures[1].stat().st_mtime_ns == before.st_mtime_ns


def test_results_that_a_full_disk_refuses_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    sweep_in(folder).run()
    limit = (folder / "results.json").stat().st_size - 1
    assert (folder / "sweep.json").stat().st_size < limit, "it is written before"
    assert limited(sweep_in(folder), limit) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"error: {str(folder)!r}: File too large; free some space, then repeat the command"


@pytest.mark.parametrize("is_copy", [False, True])
def test_the_checkpoints_of_a_moved_sweep_are_where_it_lies_now(is_copy: bool, tmp_path: Path) -> None:
    first = sweep_in(tmp_path / "first")
    first.run()
    for trial in first.state.trials:
        file = first.state.trial_folder(trial) / "result.json"
        place = {"best_checkpoint": str(file.with_name("checkpoints") / "step-00000003")}
        file.write_text(json.dumps(json.loads(file.read_text()) | place))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    if not is_copy:
        shutil.rmtree(tmp_path / "first")
    sweep_in(tmp_path / "second").run()
    found = json.loads((tmp_path / "second" / "results.json").read_text())
    assert [trial["best_checkpoint"] for trial in found] == [
        str(tmp_path / "second" / "trials" / trial["id"] / "checkpoints" / "step-00000003") for trial in found
    ]


def test_the_time_of_a_trial_before_a_kill_of_the_sweep_counts(tmp_path: Path) -> None:
    first = sweep_in(tmp_path / "sweep")
    first.run()
    one, other = first.state.trials
    for trial in (one, other):
        folder = first.state.trial_folder(trial)
        for name, moment in ((".process", 1000), ("history.jsonl", 1060), ("result.json", 1070)):
            os.utime(folder / name, (moment, moment))
        trial.state, trial.seconds = "running", 5.0
    (first.state.trial_folder(one) / "result.json").unlink()
    (first.state.trial_folder(other) / ".process").write_text("")  # Its next process had not begun.
    first.state.write()
    again = sweep_in(tmp_path / "sweep")
    again.run()
    one, other = again.state.trials
    assert 65.0 < one.seconds < 65.0 + 60.0
    assert (other.state, other.seconds) == ("finished", 5.0)
    counted = [trial.seconds for trial in again.state.trials]
    sweep_in(tmp_path / "sweep").run()
    assert [trial["seconds"] for trial in stored(tmp_path / "sweep")] == counted
