"""What stands for `python` where commands are forked: its words, output, status and signals are those of the fork."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forks import Forks, until

WAITING = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9))
print(os.getpid(), sys.argv[1:], sys.executable, os.environ["MARK"], os.getcwd(), flush=True)
print(sys.stdin.readline(), file=sys.stderr, flush=True)
time.sleep(300)
"""


@pytest.fixture
def waiting(tmp_path: Path, forks: Forks) -> subprocess.Popen[str]:
    (tmp_path / "waiting.py").write_text(WAITING)
    return subprocess.Popen(
        [forks.interpreter, "waiting.py", "a b", "--c"],
        cwd=tmp_path,
        env=forks.env | {"MARK": "\N{SNOWMAN}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, 9), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_it_is_given_all_and_ends_as_it_is_told(
    number: signal.Signals, code: int, waiting: subprocess.Popen[str], tmp_path: Path, forks: Forks
) -> None:
    assert waiting.stdout is not None
    assert waiting.stdin is not None
    pid, _, rest = waiting.stdout.readline().strip().partition(" ")
    assert rest == f"['a b', '--c'] {forks.interpreter} \N{SNOWMAN} {tmp_path}"
    waiting.stdin.write("typed\n")
    waiting.stdin.flush()
    assert waiting.stdout.readline() == "typed\n"
    waiting.send_signal(number)
    waiting.communicate(timeout=60)
    assert waiting.returncode == code
    until(lambda: not Path("/proc", pid).exists())


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_its_status_is_that_of_the_program(program: str, code: int, said: str, tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run([forks.interpreter, str(tmp_path / "program.py")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.endswith(said)


def test_what_is_no_command_of_ours_runs_in_a_real_python(forks: Forks) -> None:
    code = "import sys; print(sys.executable, 'torch' in sys.modules)"
    done = subprocess.run([forks.interpreter, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{sys.executable} False\n"
