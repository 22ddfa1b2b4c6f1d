"""Leases and jobs without a cluster: holders on other nodes are files, jobs are processes with Slurm's variables."""

from __future__ import annotations

import json
import os
import resource
import shlex
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
from diffusion_core.machine.assigned import FOLDER, TRIAL_FILE, Assigned, assigned, forget, note_trial
from diffusion_core.machine.job import LEASE_FILE, cluster_facts, command_of_job, full_disk_file, read_note
from diffusion_core.machine.jobs import JobSize
from diffusion_core.machine.leases import Leased, leased
from diffusion_core.machine.slurm.nodes import across_nodes
from diffusion_core.machine.slurm.size import job_size

ROOT = Path(__file__).resolve().parents[3]
DEAD = 2**22 + 1
"""No process has this number."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_S", 0.02), ("SILENT_S", 0.3), ("SETTLE_S", 0.1), ("FENCE_S", 0.3)):
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


def test_a_silent_process_of_another_node_has_time_to_see_that_it_is_replaced(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "FENCE_S", 1.0)
    write(file)
    start = time.monotonic()
    assert take(file) == ""
    assert time.monotonic() - start >= 1.3


def test_a_process_that_waits_for_the_end_of_the_last_holder_renews_its_lease(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "FENCE_S", 2.0)
    write(file, job="7")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(take, file, active=False)
        while json.loads(file.read_text())["token"] == "theirs":
            time.sleep(0.01)
        assert take(file) == f"process {os.getpid()} on {socket.gethostname()}"
        assert first.result() == ""


def test_a_lease_of_a_process_whose_number_another_one_has_now_is_replaced(file: Path) -> None:
    """As after a restart of the machine, or of a container, in which numbers begin again."""
    for pid in (os.getpid(), os.getppid()):
        write(file, host=socket.gethostname(), pid=pid)
        assert take(file) == ""


def test_a_lease_that_is_being_written_is_that_of_its_writer(file: Path) -> None:
    file.touch()
    written = threading.Timer(0.1, write, (file,), {"job": "7"})
    written.start()
    assert take(file, active=True) == "job 7 on elsewhere"
    written.join()


@pytest.mark.parametrize("text", ["", "[1]", '{"job": '])
def test_a_damaged_lease_is_replaced_when_nothing_touches_it(
    text: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "EMPTY_S", 0.1)
    file.write_text(text)
    assert take(file) == ""


def test_what_is_known_of_a_holder_decides_without_watching(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENT_S", 60.0)
    write(file, job="7")
    assert take(file, active=True) == "job 7 on elsewhere"
    assert take(file, active=False) == ""
    monkeypatch.setattr(leases, "FENCE_S", 60.0)
    write(file, job="7", host=socket.gethostname())
    assert take(file, active=False) == "", "a dead process of this machine ends nothing more"
    monkeypatch.setattr(leases, "FENCE_S", 0.1)
    write(file, host=socket.gethostname(), pid=DEAD)
    assert take(file) == ""
    write(file, job="8_2")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert take(file, active=True) == "", "the same job, requeued"


@pytest.mark.parametrize("own", [False, True], ids=["another job", "the same job, requeued"])
def test_a_job_that_runs_although_slurm_has_given_it_up_ends_before_the_next_one_begins(
    own: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when only the daemon of its node died."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lost, happened = threading.Event(), []

    def hold() -> None:
        with leased(file, lambda job: False, lost=lost.set):
            assert lost.wait(10)
            happened.append("the first ends")

    first = threading.Thread(target=hold)
    first.start()
    while not file.exists():
        time.sleep(0.01)
    if not own:
        monkeypatch.setenv("SLURM_JOB_ID", "8")
    with leased(file, lambda job: False):
        happened.append("the second begins")
        first.join()
        assert file.exists(), "the first left the lease of the second alone"
    assert happened == ["the first ends", "the second begins"]


def test_a_holder_whose_lease_is_gone_is_told(file: Path) -> None:
    lost = threading.Event()
    with leased(file, lambda job: None, lost=lost.set):
        file.unlink()
        assert lost.wait(10)


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


def test_a_job_whose_folder_another_one_took_over_kills_all_that_it_started_and_notes_nothing(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "trial"
    folder.mkdir()
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
    own = "import os, time; open('child', 'w').write(str(os.getpid())); os.rename('child', 'ready'); time.sleep(60)"
    hasty = "from diffusion_core.machine import job, leases; leases.BEAT_S = 0.05; raise SystemExit(job.main())"
    words = [sys.executable, "-c", hasty, str(folder), "--", sys.executable, "-c", child, own]
    process = subprocess.Popen(words, cwd=folder)
    while not (folder / "ready").exists():
        time.sleep(0.02)
    before = read_note(folder)
    (folder / LEASE_FILE).write_text(json.dumps({"job": "12", "host": "elsewhere", "pid": DEAD, "token": "theirs"}))
    assert process.wait(60) == 2
    left = Path("/proc", (folder / "ready").read_text(), "stat")
    assert not left.exists() or left.read_text().rpartition(")")[2].split()[0] == "Z"
    assert json.loads((folder / LEASE_FILE).read_text())["token"] == "theirs"
    assert read_note(folder) == before


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


# What an agent's job was killed in


@pytest.fixture
def agents_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "first")
    return tmp_path


def give(job: Path, run: str) -> Path:
    """What W&B's agent writes before it starts the command of a run."""
    file = job / f"wandb/sweep-abc/config-{run}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    time.sleep(0.02)
    file.write_text("wandb_version: 1")
    time.sleep(0.02)
    return file


def test_the_run_of_a_killed_agent_is_known_at_every_moment(agents_job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed_in() -> Assigned | None:
        return assigned(agents_job, ["me", "ours"])

    assert killed_in() is None
    file = give(agents_job, "first")
    named = {"WANDB_RUN_ID": "first", "WANDB_SWEEP_ID": "abc", "WANDB_SWEEP_PARAM_PATH": str(file)}
    unbegun = Assigned("", "first", environment=named | {"WANDB_ENTITY": "me", "WANDB_PROJECT": "ours"})
    assert killed_in() == unbegun
    note_trial(Path("runs/first"))
    assert killed_in() == Assigned(str(Path("runs/first").absolute()), "first")
    monkeypatch.delenv("WANDB_RUN_ID")  # A lottery.
    note_trial(None)
    assert killed_in() is None
    give(agents_job, "first")
    assert killed_in() == unbegun, "handed out again"
    note_trial(None)
    second = give(agents_job, "second")
    found = killed_in()
    assert found is not None
    assert (found.run, found.folder) == ("second", "")
    forget(agents_job)
    assert killed_in() is None
    assert not second.exists()
    (agents_job / TRIAL_FILE).write_text(json.dumps("/runs/old"))  # Of 0.1.
    assert killed_in() == Assigned("/runs/old")


def test_a_job_on_a_full_disk_says_so_in_one_line_and_leaves_no_lease(commands: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    words = command_of_job(folder, [sys.executable, "-c", TRIAL, "saves", "0"])
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # noqa: E731
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit, timeout=60)
    said = f"error: {str(folder)!r}: File too large; free some space on the shared disk\n"
    assert (done.returncode, done.stderr) == (74, said)
    assert list(folder.iterdir()) == [full_disk_file(folder, "12")]
    assert full_disk_file(folder, "12").stat().st_size == 0
    assert job(folder, "saves", "0").wait(60) == 0
    assert not full_disk_file(folder, "12").exists()


@pytest.mark.parametrize(
    ("words", "count", "unit"),
    [
        ("", 1, "core"),
        ("-p gpu --time=1:00 -c 4", 4, "core"),
        ("--nodes=2 --ntasks-per-node 3 --cpus-per-task=5", 30, "core"),
        ("--partition gpu --gpus=2", 2, "GPU"),
        ("-G a100:2", 2, "GPU"),
        ("--gpus=a100:2,v100:1", 3, "GPU"),
        ("-N2 --gpus-per-node=a100:8 --cpus-per-task=16", 16, "GPU"),
        ("-n 6 --gpus-per-task=1", 6, "GPU"),
        ("--gres=gpu", 1, "GPU"),
        ("--nodes=2-4 --gres=lustre:1,gpu:h100:4(S:0-1) --exclusive", 8, "GPU"),
        ("--gres=shard:4", 1, "core"),
    ],
)
def test_what_a_job_takes(words: str, count: int, unit: str) -> None:
    assert job_size(shlex.split(words)) == JobSize(count, unit)


@pytest.mark.parametrize(
    ("size", "seconds", "tasks", "device", "said"),
    [
        (JobSize(8, "GPU"), 1800.0, 24, "cuda", "about 96 GPU hours in all"),
        (JobSize(0.5, "GPU"), 3600.0, 3, None, "about 1.5 GPU hours in all"),
        (JobSize(1, "GPU"), 3600.0, 3, "cpu", "GPU hours unknown, as there is no GPU here to measure a step on"),
        (JobSize(4, "core"), 9.0, None, "cpu", "about 0.01 core hours a trial"),
        (JobSize(1, "core"), 1.0, 1, "cpu", "less than 0.01 core hours in all"),
        (JobSize(16, "GPU"), 36000.0, 1000, "cuda", "about 160,000 GPU hours in all"),
        (JobSize(2, "GPU"), None, 5, None, "GPU hours unknown"),
    ],
)
def test_what_jobs_cost(size: JobSize, seconds: float | None, tasks: int | None, device: str | None, said: str) -> None:
    assert size.hours(seconds, tasks, device) == said
