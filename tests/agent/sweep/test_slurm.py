"""Offline sweeps as jobs of a real Slurm: preempted, warned, cancelled, their coordinator killed; none lost or doubled.

The jobs are real processes of tests/stub_trial.py, which note each step.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from clusters.slurm import Cluster, cluster, end_jobs, missing, wait_for

from agent.sweep import __main__ as sweep_command
from agent.sweep.file import SweepFile, check_sweep
from agent.sweep.offline import offline_sweep, run_offline
from diffusion_core.config import ConfigError
from diffusion_core.machine.job import read_note
from diffusion_core.machine.slurm import commands, launcher
from diffusion_core.machine.slurm.queue import POLL
from diffusion_core.registries import LAUNCHERS
from diffusion_core.search.offline import OfflineSweep
from diffusion_core.search.results import table

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

ROOT = Path(__file__).resolve().parents[3]
STUB = ROOT / "tests/stub_trial.py"
STEPS = 6
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def slurm(started: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster without jobs; stub trials wait at a gate before their third step."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SLURM_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "gate").touch()
    added = {"STUB_NOTES": str(tmp_path / "notes"), "STUB_GATE": str(tmp_path / "gate"), "PYTHONPATH": str(ROOT)}
    for name, value in {**started.environment, **added, POLL: "0.5"}.items():
        monkeypatch.setenv(name, value)
    yield started
    end_jobs(started)


def stub_sweep(method: str, parameters: dict[str, Any], **more: Any) -> SweepFile:
    fixed = {"preset": "digits", "train.steps": STEPS, "train.warmup_steps": 0, "prune.step": None}
    content = {
        "method": method,
        "metric": {"name": "val/loss", "goal": "minimize"},
        "command": ["${interpreter}", "-S", str(STUB), "${args}"],
        "parameters": {key: {"value": value} for key, value in fixed.items()} | parameters,
        **more,
    }
    return check_sweep(content, "stub.yaml", "stub")


GRID = {"train.lr": {"values": [0.3, 0.1]}, "seed": {"values": [0, 1, 2]}}


def coordinator(sweep: SweepFile, folder: Path, jobs: int, words: str = "--partition=low") -> OfflineSweep:
    return offline_sweep(sweep, folder, launcher=LAUNCHERS["slurm"].make([{}] * jobs, words))


@contextmanager
def coordinator_process(sweep: SweepFile, folder: Path, jobs: int, words: str = "--partition=low") -> Iterator[int]:
    """A process that runs a sweep; yields its id. It is killed at the end."""
    process = fork.Process(target=lambda: sys.exit(run_offline(coordinator(sweep, folder, jobs, words), None)))
    process.start()
    try:
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join(60)


def noted(folder: Path) -> dict[str, list[dict[str, Any]]]:
    files = (folder / "notes").glob("*.jsonl")
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def held(folder: Path) -> list[str]:
    """The trials that wait at the gate: their last event is the second step."""
    return [name for name, events in noted(folder).items() if events and events[-1].get("step") == 2]


def trials_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / "sweep.json"
    stored: list[dict[str, Any]] = json.loads(file.read_text())["trials"] if file.exists() else []
    return stored


def assert_each_step_once(folder: Path) -> None:
    for name, events in noted(folder).items():
        assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, STEPS + 1)), name
        pids = [event["pid"] for event in events]
        assert pids == sorted(pids, key=pids.index), "one process after the other"


def test_preempted_warned_cancelled_and_without_its_coordinator_each_trial_runs_once(
    slurm: Cluster, tmp_path: Path
) -> None:
    sweep, folder = stub_sweep("grid", GRID), tmp_path / "sweep"
    with coordinator_process(sweep, folder, jobs=6):
        wait_for(lambda: len(held(tmp_path)) == 6, "six jobs")
        with pytest.raises(ConfigError, match="is being run by process"):
            coordinator(sweep, folder, 6).run()
        (folder / ".lock").unlink()  # Another node does not see the system's lock.
        with pytest.raises(ConfigError, match=r"is being run by process \d+ on ") as refused:
            coordinator(sweep, folder, 6).run()
        assert len(str(refused.value).splitlines()) == 1
    assert set(slurm.states().values()) == {"RUNNING"}, "jobs go on without their coordinator"
    before = {trial["id"]: trial["job"] for trial in trials_of(folder)}
    nodes = {name: getattr(read_note(folder / "trials" / name), "node", "") for name in before}
    assert sorted(nodes.values()).count("n1") == 4
    cancelled, warned = [name for name, node in nodes.items() if node == "n2"][:2]
    with coordinator_process(sweep, folder, jobs=6):
        slurm.ask("scancel", before[cancelled])
        slurm.ask("scancel", "--batch", "--signal=USR1", before[warned])
        wait_for(lambda: next(t["failures"] for t in trials_of(folder) if t["id"] == cancelled) == 1, "the failure")
        slurm.preempt("n1")
    (tmp_path / "gate").unlink()
    slurm.start_now()
    last = coordinator(sweep, folder, 6)
    records = last.run()
    assert {record.state for record in records} == {"finished"}
    assert all(record.queued is not None and record.queued >= 0 for record in records)
    assert table(records, ["seed"]).splitlines()[0].endswith("seconds  queued")
    assert {trial.id: trial.failures for trial in last.state.trials} == {name: name == cancelled for name in before}
    assert_each_step_once(tmp_path)
    for name, node in nodes.items():
        note = read_note(folder / "trials" / name)
        assert note is not None
        assert (note.job == before[name]) == (name != cancelled)
        assert (note.restarts == 1) == (name != cancelled)
        stops = [event["event"] for event in noted(tmp_path)[name]].count("stop")
        assert stops == 1, f"{name} on {node}"


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_asks_once_and_then_cancels(
    times: int, slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "ASK_S", 2.0)
    space = {"train.lr": {"values": [0.3, 0.1]}, "seed": {"value": 0}}
    sweep, folder = stub_sweep("grid", space), tmp_path / "sweep"
    with coordinator_process(sweep, folder, 2) as pid:
        wait_for(lambda: len(held(tmp_path)) == 2, "two jobs")
        for _ in range(times):
            os.kill(pid, signal.SIGINT)
            time.sleep(0.5)
        wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "the end")
    said = capfd.readouterr().err
    assert said.count("Ctrl-C again within 2 s cancels 2 jobs; else they go on") == 1
    assert ("2 jobs go on" in said) == (times == 1)
    assert "the same command goes on from here" in said
    states = {"RUNNING"} if times == 1 else {"CANCELLED"}
    assert {state for name, state in slurm.states().items() if name in noted(tmp_path)} == states
    assert {trial["state"] for trial in trials_of(folder)} == ({"submitted"} if times == 1 else {"waiting"})
    (tmp_path / "gate").unlink()
    last = coordinator(sweep, folder, 2)
    assert {record.state for record in last.run()} == {"finished"}
    assert {trial.failures for trial in last.state.trials} == {0}
    assert_each_step_once(tmp_path)


def test_a_sweep_process_that_is_killed_after_it_cancelled_its_jobs_costs_no_attempt(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the jobs runs, and two wait."""
    space = {"train.lr": {"values": [0.3, 0.2, 0.1]}, "seed": {"value": 0}}
    sweep, folder, words = stub_sweep("grid", space), tmp_path / "sweep", "--partition=low --nodelist=n1 -c 4"
    cancel = commands.cancel

    def cancel_and_die(ids: Any) -> None:
        cancel(ids)
        os._exit(9)

    with monkeypatch.context() as dying:
        dying.setattr(commands, "cancel", cancel_and_die)
        with coordinator_process(sweep, folder, 3, words) as pid:
            wait_for(lambda: bool(held(tmp_path)), "a job")
            wait_for(lambda: all(trial["job"] for trial in trials_of(folder)), "two that wait")
            for _ in range(2):
                os.kill(pid, signal.SIGINT)
                time.sleep(0.5)
            names = {trial["id"] for trial in trials_of(folder)}
            wait_for(lambda: {slurm.states()[name] for name in names} == {"CANCELLED"}, "their end")
    assert [(trial["state"], trial["failures"]) for trial in trials_of(folder)] == [("submitted", 0)] * 3
    (tmp_path / "gate").unlink()
    last = coordinator(sweep, folder, 3, words)
    assert {record.state for record in last.run()} == {"finished"}
    assert [trial.failures for trial in last.state.trials] == [0] * 3
    assert_each_step_once(tmp_path)


def test_what_slurm_refuses_is_one_line_and_nothing_is_written(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(json.dumps(stub_sweep("grid", GRID).config))
    for words, reason in {
        "--partition=nowhere": "invalid partition specified: nowhere",
        "--no-such-word": "sbatch: unrecognized option '--no-such-word'",
        "--time=soon": "Invalid --time specification",
        "--nodes=9": "Requested node configuration is not available",
    }.items():
        options = ["--offline", "--out", str(tmp_path / "out"), "--launcher", "slurm", "--slurm", words]
        assert sweep_command.main([str(tmp_path / "sweep.yaml"), *options]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith(f"error: --slurm = {words!r}: sbatch refuses it (")
        assert reason in line
        assert not (tmp_path / "out").exists()


def test_warned_before_its_time_limit_a_job_goes_back_into_the_queue(slurm: Cluster, tmp_path: Path) -> None:
    sweep, folder = stub_sweep("grid", {"train.lr": {"values": [0.3]}, "seed": {"value": 0}}), tmp_path / "sweep"
    with coordinator_process(sweep, folder, 1, "--partition=low --time=1 --signal=B:USR1@55"):
        wait_for(lambda: bool(held(tmp_path)), "the job")
        wait_for(lambda: [event["event"] for event in next(iter(noted(tmp_path).values()))][-1] == "stop", "a warning")
    (tmp_path / "gate").unlink()
    wait_for(lambda: "PENDING" in slurm.states().values(), "the queue")
    slurm.start_now()
    last = coordinator(sweep, folder, 1)
    assert [record.state for record in last.run()] == ["finished"]
    assert_each_step_once(tmp_path)
    assert last.state.trials[0].failures == 0


def test_a_job_that_is_held_is_named_once_and_goes_on_when_it_is_released(
    slurm: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gate").unlink()
    sweep = stub_sweep("grid", {"train.lr": {"values": [0.3]}, "seed": {"value": 0}})
    last = coordinator(sweep, tmp_path / "sweep", 1, "--partition=low --hold")

    def release() -> None:
        time.sleep(3)
        (job,) = [job for job in commands.jobs().values() if job.name == last.state.trials[0].id]
        slurm.ask("scontrol", "release", job.id)

    thread = threading.Thread(target=release)
    thread.start()
    assert [record.state for record in last.run()] == ["finished"]
    thread.join()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "held" in line]
    assert re.fullmatch(r"job (\d+) is held \(JobHeldUser\); scontrol release \1 lets it start", line)


def test_hyperband_stops_jobs_for_good(slurm: Cluster, tmp_path: Path) -> None:
    early = {"type": "hyperband", "min_iter": 1, "eta": 2}
    space = {"train.lr": {"values": [0.1, 0.2, 0.9]}, "seed": {"value": 0}}
    sweep = stub_sweep("grid", space, early_terminate=early)
    folder = tmp_path / "sweep"
    with coordinator_process(sweep, folder, 3):
        wait_for(lambda: "stopped" in [trial["state"] for trial in trials_of(folder)], "early termination")
    (tmp_path / "gate").unlink()
    records = coordinator(sweep, folder, 3).run()
    assert {record.parameters["train.lr"] for record in records if record.state == "stopped"} == {0.9}
    assert {record.parameters["train.lr"] for record in records if record.state == "finished"} == {0.1, 0.2}


def test_bayes_reads_what_jobs_measured_and_a_killed_job_is_tried_once_more(slurm: Cluster, tmp_path: Path) -> None:
    space = {"train.lr": {"min": 0.1, "max": 0.9}, "seed": {"value": 0}}
    sweep, folder = stub_sweep("bayes", space, run_cap=3), tmp_path / "sweep"
    with coordinator_process(sweep, folder, 1):
        wait_for(lambda: bool(held(tmp_path)), "the first job")
        (events,) = noted(tmp_path).values()
        job = Path(f"/proc/{events[0]['pid']}/stat").read_text().rpartition(")")[2].split()[1]
        os.kill(int(job), signal.SIGKILL)
        wait_for(lambda: trials_of(folder)[0]["failures"] == 1, "the failure")
        (tmp_path / "gate").unlink()
        wait_for(lambda: [trial["state"] for trial in trials_of(folder)] == ["finished"] * 3, "the end")
    assert_each_step_once(tmp_path)


def test_a_job_that_failed_since_the_last_look_is_not_taken_for_one_under_way(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It failed once, and is submitted again although the last look, 20 s old, shows that it runs."""
    monkeypatch.setenv("STUB_FAILURES", json.dumps({"0": 1}))
    monkeypatch.setenv("STUB_MEET", "2")
    monkeypatch.setenv(POLL, "0.1")
    space = {"train.lr": {"values": [0.3]}, "seed": {"value": 0}}
    last = coordinator(stub_sweep("grid", space), tmp_path / "sweep", 1)
    queue = last.launcher.queue  # type: ignore[attr-defined]

    def once_seen() -> None:
        wait_for(lambda: "RUNNING" in {job.state for t in last.state.trials for job in queue.named(t.id)}, "the job")
        queue.every = 20.0
        queue._next = time.monotonic() + 20.0
        (tmp_path / "gate").unlink()
        (tmp_path / "notes/met.jsonl").touch()

    threading.Thread(target=once_seen, daemon=True).start()
    assert [record.state for record in last.run()] == ["finished"]
    assert last.state.trials[0].failures == 1


@pytest.mark.parametrize("killed", ["before sbatch", "before sbatch, shown", "after sbatch, shown"])
def test_a_sweep_process_that_is_killed_while_it_submits_again_costs_no_attempt(
    killed: str, slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has noted that it submits. Slurm knows an earlier job of that name, which failed, or shows its end late."""
    monkeypatch.setenv("STUB_FAILURES", json.dumps({"0": 1}))
    (tmp_path / "gate").unlink()
    sweep = stub_sweep("grid", {"train.lr": {"values": [0.3]}, "seed": {"value": 0}})
    submit, calls = commands.submit, []

    def submit_once(*words: Any) -> str:
        calls.append(words)
        if len(calls) == 2:
            if killed.startswith("after"):
                (tmp_path / "gate").touch()
                submit(*words)
            os._exit(9)
        return submit(*words)

    process = fork.Process(target=lambda: coordinator(sweep, tmp_path / "sweep", 1).run())
    with monkeypatch.context() as dying:
        dying.setattr(commands, "submit", submit_once)
        process.start()
    process.join(60)
    assert process.exitcode == 9
    (trial,) = trials_of(tmp_path / "sweep")
    assert (trial["state"], trial["job"], trial["failures"]) == ("submitted", "", 1)
    jobs, failed, start = commands.jobs, read_note(tmp_path / "sweep/trials" / trial["id"]), time.monotonic()
    assert failed is not None

    def jobs_late() -> dict[str, commands.JobState]:
        """Slurm shows for 5 s more that the first job completes, and lists it last."""
        known = jobs()
        first = known.pop(failed.job)
        return known | {first.id: replace(first, state="COMPLETING" if time.monotonic() < start + 5 else first.state)}

    if killed.endswith("shown"):
        monkeypatch.setattr(commands, "jobs", jobs_late)
        threading.Timer(8, (tmp_path / "gate").unlink, (True,)).start()
    last = coordinator(sweep, tmp_path / "sweep", 1)
    assert [record.state for record in last.run()] == ["finished"]
    assert last.state.trials[0].failures == 1
    assert len([job for job in jobs().values() if job.name == trial["id"]]) == 2
    assert_each_step_once(tmp_path)
