"""The process that waits for the trials of a sweep: it is small, and what it started ends with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import until
from server import WandbServer
from stub_sweep import stub_content
from wandb_client import ROOT, Client, finish

from diffusion_core.config.metrics import OTHER_GOALS, given_goals, goal_of, goals
from diffusion_core.machine.child import ChildDied, in_child

MOST_BYTES = 150e6
CONTENT = stub_content(4, [0.3, 0.1])
WAITING_TRIAL = """
import os, sys, time
with open("pids", "a") as file:
    file.write(f"{os.getpid()}\\n")
open(f"started-{os.environ['WANDB_RUN_ID']}", "w").close()
while not os.path.exists("release"):
    time.sleep(0.05)
"""


def libraries(pid: int) -> set[str]:
    """Large libraries that a process has loaded."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {name for name in ("libtorch", "wandb", "matplotlib") if name in maps}


def check_small(pid: int) -> None:
    assert libraries(pid) == set()
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    assert 1000 * int(line.split()[1]) < MOST_BYTES, line


@pytest.mark.parametrize("method", ["grid", "bayes"])
def test_an_offline_coordinator_is_small(tmp_path: Path, method: str) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    more: dict[str, Any] = {"run_cap": 2} if method == "bayes" else {}
    parameters = CONTENT["parameters"] | ({"train.lr": {"min": 0.1, "max": 0.3}} if method == "bayes" else {})
    content = CONTENT | {"method": method, "parameters": parameters} | more
    early = {"type": "hyperband", "min_iter": 50}
    (tmp_path / "mine.yaml").write_text(json.dumps(content | {"early_terminate": early}))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "agent.sweep", "mine.yaml", "--offline", "--jobs", "2"],
        cwd=tmp_path,
        env=clean | {"PYTHONPATH": str(ROOT), "STUB_NOTES": str(notes), "STUB_HOLD": "1", "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: sum(path.read_text().count('"step"') for path in notes.glob("*.jsonl")) >= 4)
        check_small(process.pid)
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "estimate at most: 2 trials, 2 at a time" in output
    assert "warning: early_terminate" in output


@pytest.mark.slow
def test_the_process_that_waits_for_agents_is_small(tmp_path: Path) -> None:
    with WandbServer() as server:
        client = Client(server, tmp_path, forked=False)
        client.write("trial.py", WAITING_TRIAL)
        (tmp_path / "mine.yaml").write_text(
            json.dumps(CONTENT | {"command": ["${interpreter}", "trial.py", "${args}"]})
        )
        process = client.popen(sys.executable, "-m", "agent.sweep", "mine.yaml", "--agents", "1")
        until(lambda: process.poll() is not None or any(tmp_path.glob("started-*")))
        try:
            check_small(process.pid)
        finally:
            (tmp_path / "release").touch()
        output = finish(process, code=1)  # To W&B, a trial without a run has crashed.
    assert len(list(tmp_path.glob("started-*"))) == 2
    assert "sweep mine: http" in output


@pytest.mark.slow
def test_agents_and_trials_end_when_their_process_is_killed(tmp_path: Path) -> None:
    """Also behind a shell that W&B's agent starts in a group of its own."""
    with WandbServer() as server:
        client = Client(server, tmp_path, forked=False)
        client.write("trial.py", WAITING_TRIAL)
        command = ["/bin/sh", "-c", '"$0" trial.py "$@"; true', "${interpreter}", "${args}"]
        (tmp_path / "mine.yaml").write_text(json.dumps(CONTENT | {"command": command}))
        process = client.popen(sys.executable, "-m", "agent.sweep", "mine.yaml", "--agents", "1")
        until(lambda: process.poll() is not None or any(tmp_path.glob("started-*")))
        agents = children(process.pid)
        process.kill()
        process.communicate(timeout=60)
        pids = [*agents, int((tmp_path / "pids").read_text())]
        assert len(pids) >= 2
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert len(list(tmp_path.glob("started-*"))) == 1


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_goals_of_another_process_are_those_of_the_figures() -> None:
    table = in_child(goals)
    assert table == goals()
    assert table.keys() > OTHER_GOALS.keys()
    assert goal_of("eval/mine") is None
    with given_goals({"eval/mine": "maximize"}):
        assert (goal_of("eval/mine"), goal_of("val/loss")) == ("maximize", None)
        assert goals() == {"eval/mine": "maximize"}
    assert (goal_of("eval/mine"), goal_of("val/loss")) == (None, "minimize")


# The child process


def test_a_child_returns_prints_and_raises_as_a_call_does(capsys: pytest.CaptureFixture[str]) -> None:
    here = os.getpid()

    def work() -> int:
        print("said")
        print("warned", file=sys.stderr)
        return os.getpid()

    child = in_child(work)
    assert child != here
    assert not Path(f"/proc/{child}").exists()
    assert capsys.readouterr() == ("said\n", "warned\n")
    with pytest.raises(ValueError, match=r"^metric = 3: ") as caught:
        in_child(fail)
    assert "in fail" in "".join(caught.value.__notes__)


def fail() -> None:
    raise ValueError("metric = 3: wrong")


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda: os._exit(3), "ended with status 3"),
        (lambda: os.kill(os.getpid(), 9), "ended with SIGKILL; is there enough memory"),
        (lambda: lambda: None, "no answer from a child process: "),
    ],
)
def test_a_child_without_an_answer(work: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ChildDied, match=reason):
        in_child(work)
