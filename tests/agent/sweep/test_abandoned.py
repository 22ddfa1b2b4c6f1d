"""What an agent chose is what is trained; a trial ends when the agent or launcher that started it is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from forks import WAIT_S, WORDS
from server import Sweep, WandbServer
from wandb_client import Client

from diffusion_core.config import read_yaml
from diffusion_core.machine.launchers import is_launcher

TRIAL = ["python", "-m", "agent", *[word for word in WORDS if "log.dir" not in word]]

pytestmark = pytest.mark.slow


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with WandbServer() as server:
        yield Client(server, tmp_path, forked=False)
        assert server.errors == []


def sweep_of(client: Client, command: list[str], parameters: dict[str, Any]) -> Sweep:
    path = client.directory / "sweep.yaml"  # JSON is YAML.
    path.write_text(json.dumps({"method": "grid", "command": command, "parameters": parameters}))
    client.wandb("sweep", str(path))
    (sweep,) = client.server.sweeps.values()
    return sweep


def until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.parametrize("macro", [[], ["${args_no_boolean_flags}"]], ids=["no macro", "a macro that drops false"])
def test_the_trial_trains_what_the_agent_chose(client: Client, macro: list[str]) -> None:
    parameters = {"ema.warmup": {"values": [False]}, "train.steps": {"value": 4}, "train.lr": {"value": 0.0123}}
    sweep = sweep_of(client, [*TRIAL, "--ema.warmup=true", *macro], parameters)
    agent = client.agent(sweep, "--count", "1")
    output, _ = agent.communicate(timeout=WAIT_S)
    (run,) = client.server.runs.values()
    assert run.state == "finished", output
    trained = read_yaml(client.directory / "runs" / run.id / "config.yaml")
    for key, value in {"ema.warmup": False, "train.steps": 4, "train.lr": 0.0123}.items():
        assert trained[key] == run.config[key] == value
    assert "ema.warmup = True by the command: the sweep chose False, which is used" in output
    assert len(run.history) == 4


def test_a_trial_ends_when_its_agent_was_killed(client: Client) -> None:
    sweep = sweep_of(client, [*TRIAL, "${args}"], {"train.steps": {"value": 100_000}})
    agent = client.agent(sweep)
    until(lambda: any(run.history for run in client.server.runs.values()), "the trial trains")
    trials = psutil.Process(agent.pid).children()
    (trial,) = [process for process in trials if process.cmdline()[1:3] == ["-m", "agent"]]
    agent.kill()
    agent.communicate()
    until(lambda: not trial.is_running() or trial.status() == psutil.STATUS_ZOMBIE, "the trial ends")
    (run,) = client.server.runs.values()
    assert run.state == "preempted", "another agent goes on with it"
    folder = client.directory / "runs" / run.id
    newest = max(folder.glob("checkpoints/step-*"))
    assert int(newest.name.removeprefix("step-")) == run.history[-1]["_step"]


def test_processes_of_a_trial_end_when_their_launcher_was_killed(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--cpu", "-m", "agent"]
    words = [*WORDS, "--train.steps=100000"]
    process = subprocess.Popen(
        [*launcher, *words],
        cwd=tmp_path,
        env={**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    history = tmp_path / "run" / "history.jsonl"
    until(lambda: history.exists() and history.read_text().count("\n") > 3, "the trial trains")
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not any(worker.is_running() for worker in workers), "all processes end")
    assert any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("python /usr/bin/wandb agent me/project/abc", True),
        ("python -m wandb agent --count 3 abc", True),
        ("python -m accelerate.commands.launch --num_processes 2 -m agent", True),
        ("python /home/me/.venv/bin/accelerate launch -m agent", True),
        ("torchrun --nproc_per_node=2 -m agent", True),
        ("python -m agent.sweep sweeps/quickstart.yaml", True),
        ("bash -c python -m agent", False),
        ("/bin/bash", False),
        ("tmux", False),
        ("slurmstepd: [12.batch]", False),
        ("python -m pytest tests/agent", False),
        ("vim wandb.md agent.py", False),
    ],
)
def test_only_programs_that_wait_for_a_trial_are_launchers(words: str, expected: bool) -> None:
    assert is_launcher(words.split()) is expected
