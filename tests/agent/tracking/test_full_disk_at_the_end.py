"""A disk that is full when a trial ends: one line says so, and the command that sends the run is printed all the same.

A limit of the trial's process on the size of files stands for the disk. Its output is a pipe, which has none.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from forks import WAIT_S, WORDS
from server import Fault, WandbServer
from wandb_client import Client, finish

from agent.ending import UNSENT
from diffusion_core.machine.jobs import NO_SPACE

RETRIES = {f"WANDB_X_{what}_RETRY_WAIT_MAX_SECONDS": "1" for what in ("FILE_STREAM", "GRAPHQL", "FILE_TRANSFER")}
ENV = RETRIES | {"WANDB_RUN_ID": "one", "WANDB_FINISH_TIMEOUT": "5", "DIFFUSION_SWEEPS_DOWNLOAD_WITHIN": "3"}

pytestmark = pytest.mark.slow


def start(client: Client, *words: str) -> subprocess.Popen[str]:
    return client.popen(client.interpreter, "-m", "agent", *WORDS, *words, **ENV)


def until(condition: Callable[[], object], trial: subprocess.Popen[str]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        assert trial.poll() is None
        time.sleep(0.02)


def fill_disk(folder: Path) -> None:
    """The process that holds the lock of the run's folder can write no file any more."""
    process = psutil.Process(int((folder / "lock").read_text()))
    process.rlimit(psutil.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def steps_done(folder: Path) -> int:
    return (folder / "history.jsonl").read_text().count("\n") if (folder / "history.jsonl").exists() else 0


def test_what_wandb_lacks_is_told_although_it_cannot_be_noted(tmp_path: Path) -> None:
    with WandbServer() as server:
        client, run = Client(server, tmp_path), tmp_path / "run"
        trial = start(client, "--train.steps=100000")
        until(lambda: steps_done(run) > 8, trial)
        server.faults.append(Fault(".*", drop=True))
        fill_disk(run)
        output = finish(trial, NO_SPACE)
        assert "Traceback" not in output
        assert output.count("File too large; free some space") == 1
        assert "to send it: python -m agent.sync run\n" in output
        server.faults.clear()
        client.python("-m", "agent.sync", "run", WANDB_RUN_ID="one")
        assert len(server.runs["one"].history) == steps_done(run)


def test_a_trial_is_handed_back_although_that_cannot_be_noted(tmp_path: Path) -> None:
    with WandbServer() as server:
        client, run = Client(server, tmp_path), tmp_path / "run"
        first = start(client, "--train.steps=100000")
        until(lambda: server.runs.get("one") and len(server.runs["one"].output_artifacts) > 1, first)
        psutil.Process(int((run / "lock").read_text())).send_signal(signal.SIGTERM)
        finish(first, 128 + signal.SIGTERM)
        run.rename(tmp_path / "elsewhere")
        server.faults.append(fault := Fault("GET (storage|artifactsV2)/.*", status=404))
        second = start(client, "--train.steps=100000")
        until(lambda: fault.happened, second)
        fill_disk(run)
        output = finish(second, UNSENT)
        assert "Traceback" not in output
        assert "error: this preemption is not noted: File too large\n" in output
        assert server.runs["one"].state == "preempted"
