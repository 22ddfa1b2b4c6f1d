"""Processes that leave at once: exit handlers, output and status are as of any other process."""

import subprocess
import sys

import pytest

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
