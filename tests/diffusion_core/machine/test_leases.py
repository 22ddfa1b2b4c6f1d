"""Leases and jobs without a cluster: holders on other nodes are files, jobs are processes with Slurm's variables."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffusion_core.machine import leases
from diffusion_core.machine.job import LEASE_FILE, cluster_facts, command_of_job, read_note
from diffusion_core.machine.leases import Leased, leased
from diffusion_core.machine.slurm.nodes import across_nodes

ROOT = Path(__file__).resolve().parents[3]
DEAD = 2**22 + 1
"""No process has this number."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_S", 0.02), ("SILENT_S", 0.3), ("SETTLE_S", 0.1)):
        monkeypatch.setattr(leases, name, seconds)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lease"


def write(file: Path, job: str | None = None, host: str = "elsewhere", pid: int = DEAD, age_s: float = 0.0) -> None:
    file.write_text(json.dumps({"job": job, "host": host, "pid": pid, "token": "theirs"}))
    os.utime(file, (time.time() - age_s, time.time() - age_s))


def take(file: Path, active: bool | None = None) -> str:
    """Take a lease for a moment. Return who has it, or nothing."""
    try:
        with leased(file, lambda job: active):
            assert json.loads(file.read_text())["host"] == socket.gethostname()
    except Leased as other:
        return str(other)
    assert not file.exists()
    return ""


@pytest.fixture
def renewed(file: Path) -> Iterator[None]:
    """A holder that renews its lease, with a clock that is hours behind."""
    over = threading.Event()

    def beat() -> None:
        moment = time.time() - 10_000
        while not over.wait(0.02):
            moment += 0.02
            os.utime(file, (moment, moment))

    write(file, age_s=10_000)
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


def test_a_lease_is_held_and_released(file: Path) -> None:
    with leased(file, lambda job: None):
        first = file.stat().st_mtime_ns
        assert take(file) == f"process {os.getpid()} on {socket.gethostname()}"
        while file.stat().st_mtime_ns == first:  # It is renewed.
            time.sleep(0.01)
    assert take(file) == ""


@pytest.mark.usefixtures("renewed")
def test_a_holder_on_another_node_that_renews_its_lease_is_left_alone(file: Path) -> None:
    assert take(file) == f"process {DEAD} on elsewhere"


@pytest.mark.parametrize("age_s", [-7200.0, 0.0, 7200.0])
def test_a_silent_holder_is_replaced_whatever_its_clock_said(file: Path, age_s: float) -> None:
    write(file, age_s=age_s)
    start = time.monotonic()
    assert take(file) == ""
    assert time.monotonic() - start >= 0.3


def test_what_is_known_of_a_holder_decides_without_watching(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENT_S", 60.0)
    write(file, job="7")
    assert take(file, active=True) == "job 7 on elsewhere"
    assert take(file, active=False) == ""
    write(file, host=socket.gethostname(), pid=DEAD)
    assert take(file) == ""
    write(file, host=socket.gethostname(), pid=os.getpid())
    assert take(file) == f"process {os.getpid()} on {socket.gethostname()}"
    write(file, job="8_2")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert take(file, active=True) == "", "the same job, requeued"


def test_of_many_that_want_a_lease_one_gets_it(file: Path) -> None:
    for prepare in (lambda: None, lambda: write(file, job="7")):
        prepare()
        inside: list[int] = []

        def hold(number: int, inside: list[int] = inside) -> bool:
            try:
                with leased(file, lambda job: False):
                    inside.append(number)
                    time.sleep(0.3)
            except Leased:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(hold, range(8))) == len(inside) == 1


# Jobs


TRIAL = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    Path("history.jsonl").write_text("saved") if sys.argv[1] == "saves" else None
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
Path("ready").touch()
time.sleep(60 if len(sys.argv) == 2 else 0)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a fake scontrol notes what it is asked, and squeue says how long a job waited."""
    folder = tmp_path / "bin"
    folder.mkdir()
    waited = "echo '2026-01-01T00:00:00|2026-01-01T00:01:30'"
    for name, text in (("scontrol", f'echo "$@" >> {folder}/asked'), ("squeue", waited)):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return folder


def job(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = command_of_job(folder, [sys.executable, "-c", TRIAL, *words])
    return subprocess.Popen(command, cwd=folder)


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_ends_as_its_command_does(code: int, commands: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    assert job(folder, "saves", str(code)).wait(60) == code
    note = read_note(folder)
    assert note is not None
    assert (note.job, note.code, note.signal, note.queue_seconds) == ("12", code, "", 90.0)
    assert not (folder / LEASE_FILE).exists()
    assert not (commands / "asked").exists()
    assert job(folder, "saves", "0").wait(60) == 0
    again = read_note(folder)
    assert again is not None
    assert again.queue_seconds == 180.0, "of all its jobs"


@pytest.mark.parametrize(
    ("number", "saves", "requeued"),
    [(signal.SIGUSR1, "saves", True), (signal.SIGUSR1, "saves nothing", False), (signal.SIGTERM, "saves", False)],
)
def test_a_warned_job_requeues_itself_if_its_command_has_saved_something(
    number: signal.Signals, saves: str, requeued: bool, commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    folder = tmp_path / "trial"
    process = job(folder, saves)
    while not (folder / "ready").exists():
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == 143
    asked = commands / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 12_3\n" if requeued else "")
    note = read_note(folder)
    assert note is not None
    assert (note.code, note.signal) == (143, "warned" if number == signal.SIGUSR1 else "told")


def test_a_second_job_leaves_the_folder_of_the_first_alone(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "trial"
    first = job(folder, "saves")
    while not (folder / "ready").exists():
        time.sleep(0.02)
    (commands / "squeue").write_text("#!/bin/sh\necho '12|trial|RUNNING|None|n1'\n")
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert job(folder, "saves", "5").wait(60) == 0
    note = read_note(folder)
    assert note is not None
    assert note.job == "12"
    first.terminate()
    assert first.wait(60) == 143


def test_a_command_runs_on_all_nodes_of_its_job() -> None:
    command = ["/usr/bin/env", sys.executable, "-m", "agent", "--seed=1"]
    assert across_nodes(command, {}) == across_nodes(command, {"SLURM_JOB_NUM_NODES": "1"}) == command
    two = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "10007", "SLURM_GPUS_ON_NODE": "8"}
    words = across_nodes(command, two)
    assert words[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--nnodes=2", "--nproc-per-node=8", "--kill-on-bad-exit=1"} <= set(words)
    assert f"--rdzv-endpoint={socket.gethostname()}:20007" in words
    assert words[-3:] == command[2:]
    assert across_nodes(["program", "a"], two)[-3:] == ["--no-python", "program", "a"]
    assert "--nproc-per-node=1" in across_nodes(command, {**two, "SLURM_GPUS_ON_NODE": ""})


def test_the_facts_of_a_job() -> None:
    assert cluster_facts({}) == {}
    said = {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_PARTITION": "gpu",
            "SLURMD_NODENAME": "n7", "SLURM_GPUS_ON_NODE": "4", "DIFFUSION_SWEEPS_QUEUE_S": "90"}  # fmt: skip
    assert cluster_facts(said) == {
        "slurm/job": "12_2",
        "slurm/array_index": 2,
        "slurm/partition": "gpu",
        "slurm/node": "n7",
        "slurm/gpus": 4,
        "slurm/restarts": 0,
        "slurm/queue_seconds": 90,
    }
