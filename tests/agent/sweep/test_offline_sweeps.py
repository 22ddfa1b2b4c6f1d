"""Offline sweeps: several trials at once, killed and started again at any moment, nothing lost and nothing done twice.

Scheduling is tested with real processes of tests/stub_trial.py; a coordinator that is to be killed is a real process.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from forks import Forks

from agent.sweep import __main__ as sweep
from agent.sweep import offline as agent_offline
from agent.sweep.file import SweepFile, check_sweep
from agent.sweep.offline import offline_sweep, run_offline
from diffusion_core.machine import processes, sharing
from diffusion_core.machine.jobs import Launcher, Outcome
from diffusion_core.machine.sharing import SHARERS
from diffusion_core.run_folder import SWEEP_STATE
from diffusion_core.search import engine, offline
from diffusion_core.search import state as sweep_state
from diffusion_core.search.offline import NothingWorks, OfflineSweep, hopeless
from diffusion_core.search.state import Trial
from diffusion_core.search.sweep import SweepError
from diffusion_core.search.trials import TrialReader

STUB = Path(__file__).parents[2] / "stub_trial.py"
STEPS = 6
PATIENCE_S = 300.0
fork = multiprocessing.get_context("fork")


def stub_sweep(method: str, parameters: dict[str, Any], **more: Any) -> SweepFile:
    """A sweep of stub trials; all it says of parameters is checked as for the real program."""
    fixed = {"preset": {"value": "digits"}, "train.steps": {"value": STEPS}, "seed": {"value": 0},
             "train.warmup_steps": {"value": 0}, "prune.step": {"value": None}}  # fmt: skip
    if "values" in parameters.get("train", {}):  # They have steps of their own.
        del fixed["train.steps"]
    content = {
        "method": method,
        "metric": {"name": "val/loss", "goal": "minimize"},
        "command": ["${interpreter}", "-S", str(STUB), "${args}"],
        "parameters": fixed | parameters,
        **more,
    }
    return check_sweep(content, "stub.yaml", "stub sweep")


GRID = {"train.lr": {"values": [0.3, 0.1]}, "seed": {"values": [0, 1]}}
RANGE = {"train": {"parameters": {"lr": {"min": 0.1, "max": 0.9}}}, "seed": {"min": 0, "max": 9}}
SWEEPS = {
    "grid": (stub_sweep("grid", GRID), 4),
    "random": (stub_sweep("random", RANGE, run_cap=4), 4),
    "bayes": (stub_sweep("bayes", RANGE, run_cap=4), 4),
    "hyperband": (
        stub_sweep("random", RANGE, run_cap=4, early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2}),
        4,
    ),
}


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stub trials note what they do."""
    folder = tmp_path / "notes"
    folder.mkdir()
    monkeypatch.setenv("STUB_NOTES", str(folder))
    monkeypatch.setattr(offline, "POLL_SECONDS", 0.01)
    # It takes longer than all of a stub sweep; made where the whole command is run, and in tests of its own.
    monkeypatch.setattr(agent_offline, "write_ended", lambda *arguments, **options: None)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return folder


def noted(notes: Path) -> dict[str, list[dict[str, Any]]]:
    """What each trial noted, by its id."""
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in notes.glob("*.jsonl")}


def held(notes: Path) -> list[str]:
    """The trials that wait before their third step."""
    return [
        run_id for run_id, events in noted(notes).items() if [e["event"] for e in events] == ["start", "step", "step"]
    ]


def states(coordinator: OfflineSweep) -> list[str]:
    return [trial.state for trial in coordinator.state.trials]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_each_step_once(notes: Path, whole: bool = True) -> None:
    """No step of a trial was left out or done twice, and no two processes of a trial were there at once."""
    for events in noted(notes).values():
        steps = [event["step"] for event in events if event["event"] == "step"]
        assert steps == list(range(1, len(steps) + 1))
        if whole:
            assert len(steps) == STEPS
            assert [event["event"] for event in events].count("end") == 1
        pids = [event["pid"] for event in events]
        assert pids == sorted(pids, key=pids.index), "one process after the other"


@contextmanager
def coordinator_process(loaded: SweepFile, folder: Path, jobs: int = 2) -> Iterator[int]:
    """A process that runs a sweep; yields its id."""

    def run() -> None:
        os.setsid()
        sys.exit(run_offline(offline_sweep(loaded, folder, jobs), None))

    process = fork.Process(target=run)
    process.start()
    try:
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join(PATIENCE_S)


# To the end


@pytest.mark.parametrize("method", ["grid", "random", "bayes"])
def test_a_sweep_runs_to_its_end_two_trials_at_once(
    method: str, tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_MEET", "2")
    loaded, count = SWEEPS[method]
    coordinator = offline_sweep(loaded, tmp_path / "out", jobs=2)
    records = coordinator.run()
    assert states(coordinator) == ["finished"] * count
    assert len(records) == len(noted(notes)) == count
    assert [record.figures["val/loss"] for record in records] == sorted(
        record.figures["val/loss"] for record in records
    )
    assert_each_step_once(notes)
    spans = [(events[0]["time"], events[-1]["time"]) for events in noted(notes).values()]
    at_once = [sum(start <= moment <= end for start, end in spans) for moment, _ in spans]
    assert max(at_once) == 2
    for events in noted(notes).values():
        assert events[0]["environment"]["WANDB_MODE"] == "offline"
        assert events[0]["environment"]["WANDB_RUN_GROUP"] == "stub sweep"
    # Nothing is left to do: run again, nothing is run.
    assert offline_sweep(loaded, tmp_path / "out", jobs=2).run() == records
    assert_each_step_once(notes)


@pytest.mark.parametrize("method", ["grid", "random"])
def test_what_is_suggested_does_not_depend_on_how_many_run_at_once(method: str, tmp_path: Path) -> None:
    loaded, count = SWEEPS[method]
    coordinator = offline_sweep(loaded, tmp_path / "out", jobs=3)
    coordinator.run()
    runs: list[Any] = []
    for trial in coordinator.state.trials:
        assert engine.suggest(loaded.engine_config(), runs) == trial.parameters
        runs.append(engine.past_run(trial.id, trial.parameters, "finished", {}, []))
    assert len(runs) == count


def test_a_count_is_of_trials_now_and_the_rest_comes_later(tmp_path: Path, notes: Path) -> None:
    loaded, _ = SWEEPS["grid"]
    assert len(offline_sweep(loaded, tmp_path / "out", 2).run(count=1)) == 1
    assert len(offline_sweep(loaded, tmp_path / "out", 2).run(count=2)) == 3
    assert len(offline_sweep(loaded, tmp_path / "out", 2).run()) == 4
    assert_each_step_once(notes)


def test_a_sweep_is_extended_by_a_higher_cap(tmp_path: Path, notes: Path) -> None:
    first = offline_sweep(stub_sweep("random", RANGE, run_cap=2), tmp_path / "out")
    first.run()
    more = offline_sweep(stub_sweep("random", RANGE, run_cap=3), tmp_path / "out")
    more.run()
    assert [trial.id for trial in more.state.trials[:2]] == [trial.id for trial in first.state.trials]
    assert len(noted(notes)) == 3
    assert_each_step_once(notes)


TARGET = {"name": "val/loss", "goal": "minimize", "target": 0.5}


@pytest.mark.parametrize("jobs", [1, 2])
def test_when_a_trial_reaches_the_target_no_further_one_begins(
    jobs: int, tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As W&B documents it: what runs at that moment runs to its end."""
    loaded = stub_sweep("grid", {"train.lr": {"values": [0.9, 0.2, 0.8, 0.1, 0.7, 0.6]}}, metric=TARGET)
    coordinator = offline_sweep(loaded, tmp_path / "out", jobs)
    coordinator.run()
    count = {1: [2], 2: [2, 3]}[jobs]  # A second process takes the third as soon as the first is done.
    assert len(coordinator.state.trials) in count
    assert set(states(coordinator)) == {"finished"}
    assert_each_step_once(notes)
    said = "metric.target = 0.5: reached; no further trial begins"
    assert capsys.readouterr().out.count(said) == 1
    again = offline_sweep(loaded, tmp_path / "out", jobs)
    again.run()
    assert again.state.trials == coordinator.state.trials
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "value", "target", "expected"),
    [
        ("val/loss", 0.5, 0.5, True),
        ("val/loss", 0.4, 0.5, True),
        ("val/loss", 0.6, 0.5, False),
        ("val/loss", math.nan, 0.5, False),
        ("val/loss", 0.4, None, False),
        ("eval/class_agreement", 0.9, 0.8, True),
        ("eval/class_agreement", 0.7, 0.8, False),
    ],
)
def test_a_target_is_reached_in_the_better_direction(
    metric: str, value: float, target: float | None, expected: bool, tmp_path: Path
) -> None:
    state = sweep_state.SweepState(SWEEPS["grid"][0], tmp_path)
    state.trials.append(sweep_state.Trial("t", {}))
    reader = TrialReader(state, metric)
    assert not reader.reached(target)
    state.trial_folder(state.trials[0]).mkdir(parents=True)
    (state.trial_folder(state.trials[0]) / "history.jsonl").write_text(json.dumps({"step": 1, metric: value}) + "\n")
    assert reader.reached(target) == expected


# Stopped and started again


@pytest.mark.parametrize("method", SWEEPS)
def test_killed_and_started_again_no_trial_is_lost_or_run_twice(
    method: str, tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, count = SWEEPS[method]
    folder = tmp_path / "out"
    monkeypatch.setenv("STUB_HOLD", "3")
    with coordinator_process(loaded, folder) as pid:
        # Two have ended, and the two others are in the middle.
        wait_for(lambda: len(held(notes)) == 2)
        os.kill(pid, signal.SIGKILL)
    before = {trial["id"] for trial in json.loads((folder / "sweep.json").read_text())["trials"]}
    monkeypatch.delenv("STUB_HOLD")
    coordinator = offline_sweep(loaded, folder, jobs=2)
    records = coordinator.run()
    assert len(records) == len(noted(notes)) == count
    assert before <= {record.id for record in records}
    assert_each_step_once(notes, whole=method != "hyperband")
    expected = {"finished", "stopped"} if method == "hyperband" else {"finished"}
    assert {record.state for record in records} <= expected
    # The killed one's trials had been told to end, and did.
    assert [event["event"] for event in noted(notes)[sorted(noted(notes))[-1]]][:5] == [
        "start",
        "step",
        "step",
        "stop",
        "start",
    ]


def test_trials_behind_a_shell_end_with_their_killed_coordinator(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell dies of the SIGTERM that it receives, and does not pass it on."""
    loaded = stub_sweep("grid", GRID, command=["/bin/sh", "-c", f'"$0" -S {STUB} "$@"; exit $?', "${interpreter}",
                                               "${args}"])  # fmt: skip
    monkeypatch.setenv("STUB_HOLD", "1")
    with coordinator_process(loaded, tmp_path / "out") as pid:
        wait_for(lambda: len(held(notes)) == 2)
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(events[0]["pid"]) for events in noted(notes).values()))
    assert [events[-1]["event"] for events in noted(notes).values()] == ["stop", "stop"]
    monkeypatch.delenv("STUB_HOLD")
    coordinator = offline_sweep(loaded, tmp_path / "out", jobs=2)
    coordinator.run()
    assert states(coordinator) == ["finished"] * 4
    assert_each_step_once(notes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_waits_for_its_trials_and_goes_on_later(
    number: signal.Signals,
    tmp_path: Path,
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    loaded, count = SWEEPS["grid"]
    folder = tmp_path / "out"
    monkeypatch.setenv("STUB_HOLD", "2")
    with coordinator_process(loaded, folder) as pid:
        wait_for(lambda: len(held(notes)) == 2)
        os.kill(pid, number)
        wait_for(lambda: not alive(pid))
    assert "the same command goes on from here" in capfd.readouterr().err
    stored = json.loads((folder / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in stored] == ["finished", "waiting", "waiting"]
    assert not any(trial["failures"] for trial in stored)
    for events in noted(notes).values():
        assert not alive(events[0]["pid"])
        assert events[-1]["event"] in ("stop", "end")
    monkeypatch.delenv("STUB_HOLD")
    coordinator = offline_sweep(loaded, folder, jobs=2)
    coordinator.run()
    assert states(coordinator) == ["finished"] * count
    assert_each_step_once(notes)


def test_a_trial_that_survives_its_coordinator_is_ended_before_it_is_gone_on_with(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ignores signals, as one does that hangs."""
    loaded = stub_sweep("grid", {"train.lr": {"values": [0.1]}})
    monkeypatch.setenv("STUB_STUBBORN", "1")
    monkeypatch.setenv("STUB_HANG", "1")
    with coordinator_process(loaded, tmp_path / "out") as pid:
        wait_for(lambda: bool(noted(notes)))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid))
    (events,) = noted(notes).values()
    orphan = events[0]["pid"]
    assert alive(orphan)
    monkeypatch.delenv("STUB_STUBBORN")
    monkeypatch.delenv("STUB_HANG")
    monkeypatch.setattr(processes, "ORPHAN_GRACE_SECONDS", 0.2)
    coordinator = offline_sweep(loaded, tmp_path / "out")
    coordinator.run()
    assert not alive(orphan)
    assert states(coordinator) == ["finished"]
    assert_each_step_once(notes)


def test_a_process_of_another_host_is_waited_for_and_never_signalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks reach other nodes, its number is that of somebody else's process here."""
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    monkeypatch.setattr(processes, "ORPHAN_GRACE_SECONDS", 0.1)
    holder = processes._lock(tmp_path)
    (tmp_path / processes.LOCK_FILE).write_text(f"{bystander.pid} elsewhere")
    waiting = threading.Thread(target=processes.end_orphan, args=[tmp_path])
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive()
    assert bystander.poll() is None
    os.close(holder)
    waiting.join(10)
    assert not waiting.is_alive()
    bystander.kill()
    bystander.wait()


def test_a_trial_that_ended_while_nobody_looked_is_not_run_again(tmp_path: Path, notes: Path) -> None:
    loaded, _ = SWEEPS["grid"]
    coordinator = offline_sweep(loaded, tmp_path / "out")
    coordinator.run(count=2)
    for trial, state in zip(coordinator.state.trials, ("running", "stopping"), strict=True):
        trial.state = state
    coordinator.state.write()
    (coordinator.state.trial_folder(coordinator.state.trials[1]) / "result.json").unlink()
    again = offline_sweep(loaded, tmp_path / "out")
    again.run()
    assert states(again) == ["finished", "stopped", "finished", "finished"]
    assert_each_step_once(notes)


def test_a_second_coordinator_is_refused_in_one_line(
    tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, _ = SWEEPS["grid"]
    with coordinator_process(loaded, tmp_path / "out") as pid:
        wait_for(lambda: bool(noted(notes)))
        with pytest.raises(SweepError, match=f"is being run by process {pid}; ") as caught:
            offline_sweep(loaded, tmp_path / "out").run()
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sweep": {}}', '{"sweep": {}, "trials": [{"id": 1}]}', "null"])
def test_a_damaged_state_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / SWEEP_STATE).write_text(content)
    with pytest.raises(SweepError, match=r"its sweep\.json is damaged") as caught:
        offline_sweep(SWEEPS["grid"][0], tmp_path)
    assert len(str(caught.value).splitlines()) == 1


# Trials that fail, and trials that are given up


def test_a_trial_that_fails_is_tried_once_more_and_the_sweep_goes_on(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STUB_FAILURES", json.dumps({"1": 1, "2": 9}))
    loaded = stub_sweep("grid", {"train.lr": {"value": 0.1}, "seed": {"values": [1, 2, 3]}})
    coordinator = offline_sweep(loaded, tmp_path / "out", jobs=2)
    assert run_offline(coordinator, None) == 1
    assert states(coordinator) == ["finished", "failed", "finished"]
    events = list(dict(sorted(noted(notes).items())).values())
    assert [[event["event"] for event in trial].count("fail") for trial in events] == [1, 2, 0]
    out = capsys.readouterr().out
    first, second, third = (trial.id for trial in coordinator.state.trials)
    assert f"[1/3] {first} failed with status 1 and runs once more, see " in out
    assert f"[2/3] {second} failed again with status 1, see " in out
    assert (
        "stub: this one fails"
        in (coordinator.state.trial_folder(coordinator.state.trials[1]) / "console.log").read_text()
    )
    assert f"[3/3] {third} finished, val/loss 0.2667, rank " in out
    # What has failed for good stays so.
    assert run_offline(offline_sweep(loaded, tmp_path / "out", jobs=2), None) == 1
    assert len(noted(notes)[second]) == len(events[1])


def test_where_nothing_works_not_every_trial_is_tried(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_FAILURES", json.dumps({str(seed): 9 for seed in range(10)}))
    coordinator = offline_sweep(stub_sweep("random", RANGE), tmp_path / "out", jobs=2)
    with pytest.raises(NothingWorks, match="the last 5 trials failed; nothing more is started"):
        coordinator.run()
    assert offline.FAILURES_IN_A_ROW <= len(noted(notes)) <= offline.FAILURES_IN_A_ROW + 1


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        (["failed"] * 4, False),
        (["failed"] * 5, True),
        (["finished", *["failed"] * 5], True),
        (["failed"] * 5 + ["finished"], False),
        (["failed"] * 4 + ["stopped"] + ["failed"] * 4, False),
    ],
)
def test_trials_that_fail_in_a_row_are_hopeless(ended: list[str], expected: bool) -> None:
    assert hopeless(ended) == expected


def test_a_machine_that_breaks_at_night_does_not_burn_the_sweep_and_failed_trials_run_again(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    seeds = {"train.lr": {"value": 0.1}, "seed": {"values": list(range(9))}}
    Path("mine.yaml").write_text(yaml.safe_dump(stub_sweep("grid", seeds).config))
    command = ["mine.yaml", "--offline", "--jobs", "1"]

    def stored() -> list[tuple[str, int]]:
        trials = json.loads(Path("runs/sweeps/mine/sweep.json").read_text())["trials"]
        return [(trial["state"], trial["failures"]) for trial in trials]

    monkeypatch.setenv("STUB_FAILURES", json.dumps({str(seed): 99 for seed in range(1, 9)}))
    assert sweep.main(command) == 1
    assert stored() == [("finished", 0), *[("failed", 2)] * 5]
    said = capsys.readouterr()
    assert "error: the last 5 trials failed; nothing more is started; mend the cause, then repeat" in said.err
    remedy = "5 trials failed; to run failed trials again, add --retry-failed to the same command"
    assert said.out.splitlines()[-1] == remedy
    # The machine is well again. What has not begun goes on, and what failed is not run again unasked.
    monkeypatch.delenv("STUB_FAILURES")
    assert sweep.main(command) == 1
    assert stored() == [("finished", 0), *[("failed", 2)] * 5, *[("finished", 0)] * 3]
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == remedy
    monkeypatch.setenv("STUB_FAILURES", json.dumps({"5": 99}))
    assert sweep.main([*command, "--retry-failed"]) == 1
    assert stored() == [*[("finished", 0)] * 5, ("failed", 2), *[("finished", 0)] * 3]
    said = capsys.readouterr()
    assert "estimate: 5 trials, 1 at a time; " in said.out
    assert said.out.splitlines()[-1].startswith("1 trial failed; ")
    monkeypatch.delenv("STUB_FAILURES")
    assert sweep.main([*command, "--retry-failed"]) == 0
    assert stored() == [("finished", 0)] * 9
    assert "--retry-failed" not in capsys.readouterr().out
    assert_each_step_once(notes)
    # A sweep of another name is another one.
    assert sweep.main([*command, "--name", "again", "--count", "1"]) == 0
    (one, *none) = json.loads(Path("runs/sweeps/again/sweep.json").read_text())["trials"]
    assert (one["state"], none) == ("finished", [])


def test_a_command_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    loaded = stub_sweep("grid", GRID, command=["no-such-program", "${args}"])
    with pytest.raises(SweepError, match="command = 'no-such-program': No such file or directory"):
        offline_sweep(loaded, tmp_path / "out").run()


GOOD = [{"lr": 0.1, "steps": 6}, {"lr": 0.1, "steps": 7}, {"lr": 0.1, "steps": 8}]
BAD = [{"lr": 0.8, "steps": 1_000_000}, {"lr": 0.9, "steps": 1_000_000}]
ONE_BAND = {"type": "hyperband", "max_iter": 9, "eta": 3, "s": 1}
"""At three values. With later bands an endless trial would come to one that no other reaches."""


@pytest.mark.parametrize("jobs", [1, 2])
def test_hyperband_stops_bad_trials_and_lets_good_ones_finish(jobs: int, tmp_path: Path, notes: Path) -> None:
    values = [GOOD[0], GOOD[1], *BAD, GOOD[2]]
    loaded = stub_sweep("grid", {"train": {"values": values}}, early_terminate=ONE_BAND)
    coordinator = offline_sweep(loaded, tmp_path / "out", jobs)
    records = coordinator.run()
    assert states(coordinator) == ["finished", "finished", "stopped", "stopped", "finished"]
    assert [record.parameters["train"]["lr"] for record in records] == [0.1, 0.1, 0.1, 0.8, 0.9]
    for record in records:
        steps = sum(event["event"] == "step" for event in noted(notes)[record.id])
        if record.state == "stopped":
            assert steps > 3, "it is judged when it has more values than the band"
            assert noted(notes)[record.id][-1]["event"] == "stop"
        else:
            assert steps == record.parameters["train"]["steps"]


def test_a_trial_that_does_not_stop_is_killed(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_STUBBORN", "1")
    monkeypatch.setattr(offline, "STOP_GRACE_SECONDS", 0.1)
    loaded = stub_sweep("grid", {"train": {"values": [GOOD[0], BAD[0]]}}, early_terminate=ONE_BAND)
    coordinator = offline_sweep(loaded, tmp_path / "out")
    coordinator.run()
    assert states(coordinator) == ["finished", "stopped"]
    assert noted(notes)[coordinator.state.trials[1].id][-1]["event"] == "step"


# How a machine is shared


def test_gpus_and_cores_are_dealt_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sharing, "usable_cores", lambda: 10)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,GPU-1")
    assert sharing.shares(1) == [{}]
    assert sharing.shares(4) == [
        {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("3", "5", "7", "GPU-1")
    ]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in sharing.shares(2)] == ["3,5", "7,GPU-1"]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in sharing.shares(3)] == ["3", "5", "7,GPU-1"]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in sharing.shares(6)] == ["3", "5", "7", "GPU-1", "3", "5"]
    assert [share.get(SHARERS) for share in sharing.shares(6)] == ["2", "2", None, None, "2", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sharing.shares(3) == [{"OMP_NUM_THREADS": "3", SHARERS: "3"}] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert sharing.shares(3) == [{"OMP_NUM_THREADS": "7", SHARERS: "3"}] * 3
    assert sharing.threads_each(3) == 7


def test_every_trial_keeps_to_its_share(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("STUB_MEET", "2")
    offline_sweep(SWEEPS["grid"][0], tmp_path / "out", jobs=2).run()
    spans: dict[str, list[tuple[float, float]]] = {"4": [], "6": []}
    for events in noted(notes).values():
        assert int(events[0]["environment"]["OMP_NUM_THREADS"]) == max(1, sharing.usable_cores() // 2)
        spans[events[0]["environment"]["CUDA_VISIBLE_DEVICES"]].append((events[0]["time"], events[-1]["time"]))
    for uses in spans.values():
        assert uses
        assert all(end <= start for (_, end), (start, _) in zip(sorted(uses), sorted(uses)[1:], strict=False))


@dataclass
class KeptJob:
    """A job of a cluster, which ends when it is told to, or only when it is killed; or by itself."""

    deaf: bool
    ends: bool = False
    told: list[str] = field(default_factory=list)
    id: str | None = "7"
    seconds: float = 1.0
    total_seconds: float | None = None
    polls: int = 0

    def poll(self) -> Outcome | None:
        self.polls += 1
        assert self.polls < 500, "nobody ends it"
        if self.ends:
            return Outcome(0)
        return Outcome(143) if ("kill" if self.deaf else "stop") in self.told else None

    def stop(self) -> None:
        self.told.append("stop")

    def kill(self) -> None:
        self.told.append("kill")


@dataclass
class KeepingLauncher:
    """Keeps jobs by their ids."""

    jobs: dict[str, KeptJob]
    slots: int = 2

    def adopt(self, name: str, folder: Path, job: str, submitted: object) -> KeptJob:
        return self.jobs[job]

    def listening(self) -> nullcontext[list[int]]:
        return nullcontext([])

    def locked(self, folder: Path) -> nullcontext[None]:
        return nullcontext()

    def log(self, folder: Path) -> None:
        return None


@pytest.mark.parametrize("deaf", [False, True])
def test_a_later_process_stops_again_what_was_given_up_and_nothing_else(
    deaf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one may have died before it could tell the job."""
    monkeypatch.setattr(offline, "STOP_GRACE_SECONDS", 0.2)
    jobs = {"1": KeptJob(deaf), "2": KeptJob(deaf, ends=True)}
    launcher = cast(Launcher, KeepingLauncher(jobs))
    grid = stub_sweep("grid", {"train.lr": {"values": [0.3, 0.1]}})
    first = offline_sweep(grid, tmp_path / "sweep", launcher=launcher)
    lasting = {"one": ("stopping", "1"), "two": ("submitted", "2")}
    for rate, (name, (state, job)) in zip((0.3, 0.1), lasting.items(), strict=True):
        first.state.trials.append(Trial(name, {"train.lr": rate}, state, job=job))
    with first.state.locked():
        first.state.write()
    later = offline_sweep(grid, tmp_path / "sweep", launcher=launcher)
    later.run()
    assert states(later) == ["stopped", "finished"]
    assert [trial.job for trial in later.state.trials] == [None, None]
    assert (jobs["1"].told, jobs["2"].told) == (["stop", "kill"] if deaf else ["stop"], [])


# The command line


def test_the_real_command_estimates_runs_and_ranks(tmp_path: Path, notes: Path, forks: Forks) -> None:
    import yaml

    loaded, _ = SWEEPS["grid"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(loaded.config))
    command = [str(forks.interpreter), "-m", "agent.sweep", "mine.yaml", "--offline", "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(STUB.parents[1]), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    (advice,) = done.stderr.splitlines()
    assert "checkpoint.best_metric = 'eval/class_agreement': trials are ranked by the best val/loss" in advice
    lines = done.stdout.splitlines()
    assert lines[0].startswith("estimate: 4 trials, 2 at a time; ")
    starts = [line for line in lines if " starts: seed=" in line]
    ends = [line for line in lines if " finished, val/loss " in line]
    assert len(starts) == len(ends) == 4
    assert "rank 1 of 1" in ends[0]
    assert "left" in ends[0]
    assert "of 4" in ends[-1]
    assert "left" not in ends[-1]
    assert "mine: 4 trials, best val/loss first" in lines
    rows = lines[lines.index("mine: 4 trials, best val/loss first") + 3 :][:4]
    assert [row.split()[4] for row in rows] == ["0.1", "0.1", "0.3", "0.3"]
    assert {path.name for path in (tmp_path / "runs/sweeps/mine").iterdir() if not path.name.startswith(".")} == {
        "sweep.json", "trials", "results.csv", "results.json", "results.png", "report.html",
    }  # fmt: skip


def test_a_dry_run_lists_trials_with_their_cost_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    loaded, _ = SWEEPS["hyperband"]
    Path("mine.yaml").write_text(yaml.safe_dump(loaded.config))
    assert sweep.main(["mine.yaml", "--offline", "--dry-run", "--count", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines[:-1:2]] == ["[1]", "[2]", "[3]"]
    assert all("parameters, " in line and " of checkpoints, about " in line for line in lines[1:-1:2])
    assert lines[-1].startswith("estimate at most: 3 trials, 1 at a time; ")
    first = engine.suggest(loaded.engine_config(), [])
    assert first is not None
    assert f"train.lr={first['train.lr']:.4g}" in lines[0]
    assert not Path("runs").exists()
