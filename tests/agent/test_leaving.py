"""Processes that leave at once: exit handlers, output and status are as of any other process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import atexit, sys, threading, time
from agent.command import run_and_leave

class Left:
    def __del__(self):
        print("cleared away")

kept = Left()

def main():
    atexit.register(lambda: print("handler", flush=False))
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("main", file=sys.stderr)
    {ending}

run_and_leave(main)
"""


@pytest.mark.parametrize(("ending", "status"), [("return 0", 0), ("return 143", 143), ("sys.exit(7)", 7)])
def test_handlers_threads_output_and_status(ending: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(ending=ending)], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout.split("\n")[:2] == ["thread", "handler"]
    assert done.stderr == "main\n"
    # What main returns ends the process at once; what it raises, as everywhere.
    assert ("cleared away" in done.stdout) == ending.startswith("sys.exit")


def test_an_error_is_told_as_everywhere() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending="raise ValueError('broken')")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ValueError: broken" in done.stderr


AT_ONCE = """
import os, signal

real = signal.signal

def at_once(number, handler):
    old = real(number, handler)
    if number == signal.SIGTERM and callable(handler):
        signal.signal = real
        os.kill(os.getpid(), number)
    return old

signal.signal = at_once
"""


@pytest.mark.parametrize(
    ("words", "sweep", "status", "said"),
    [
        (["-m", "agent"], "abc", 2, "error: nonsense"),
        (["-umagent"], "abc", 2, "error: nonsense"),
        (["-m", "agent"], "", 143, "interrupted\n"),
        (["-m", "agent.sync"], "abc", 143, "interrupted\n"),
    ],
)
def test_a_trial_of_an_agent_remembers_sigterm_from_its_first_moment(
    words: list[str], sweep: str, status: int, said: str, tmp_path: Path
) -> None:
    """As soon as it has a handler: W&B is told later that the trial is handed back. Other commands leave."""
    (tmp_path / "sitecustomize.py").write_text(AT_ONCE)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"} | ({"WANDB_SWEEP_ID": sweep} if sweep else {})
    done = subprocess.run(
        [sys.executable, *words, "--nonsense=1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(said)
