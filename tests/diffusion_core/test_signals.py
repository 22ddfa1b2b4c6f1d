"""Ctrl-C and SIGTERM at any moment of a command's start: one line and 128 + the signal's number, and no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import ROOT, WORDS, handles, until

from agent.command import UNUSABLE

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
COMMANDS = {
    "agent": [*WORDS, "--train.steps=1000000"],
    "agent.sweep": ["sweep.json", "--offline"],
    "agent.sync": ["run"],
    "agent.clean": ["run"],
    "agent.leaderboard": ["run"],
}
SWEEP = {
    "method": "grid",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "command": ["${interpreter}", "-S", str(ROOT / "tests" / "stub_trial.py"), "${args}"],
    "parameters": {"preset": {"value": "digits"}, "train.steps": {"value": 900}, "train.lr": {"values": [0.1]}},
}


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A command in a folder with what the commands above name. It returns when Python has begun to import it."""
    (folder / "run").mkdir(exist_ok=True)
    (folder / "notes").mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(SWEEP))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=clean | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "STUB_NOTES": str(folder / "notes")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until(lambda: process.poll() is not None or handles(process.pid, signal.SIGTERM))
    return process


def check_left(process: subprocess.Popen[str], number: int) -> None:
    output, _ = process.communicate(timeout=300)
    assert "Traceback" not in output, output
    assert "Error" not in output, output
    if process.returncode in (0, UNUSABLE):  # It had nothing to do, and was faster.
        return
    # A sweep that is stopped while trials run says 130 for every signal.
    assert process.returncode in (128 + number, 130), output
    lines = [line for line in output.splitlines() if line.startswith(("interrupted", "stopped"))]
    assert len(lines) == 1, output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_interrupted_at_any_moment_of_its_start(
    command: str, number: signal.Signals, tmp_path: Path
) -> None:
    for place, delay in enumerate((0.0, 0.05, 0.3, 1.0, 3.0)):
        folder = tmp_path / str(place)
        folder.mkdir()
        process = start(folder, "-m", command, *COMMANDS[command])
        time.sleep(delay)
        process.send_signal(number)
        check_left(process, number)


@pytest.mark.slow
def test_every_script_is_interrupted_while_it_imports(tmp_path: Path) -> None:
    for place, script in enumerate(SCRIPTS):
        number = signal.SIGTERM if place % 2 else signal.SIGINT
        process = start(tmp_path, str(ROOT / "scripts" / script), "--out", "out")
        time.sleep(0.02)  # Its first handlers are there. The quickest script is past its imports after 0.2 s.
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
        assert (process.returncode, output) == (128 + number, "interrupted\n"), script


MAIN = """
import sys, time
from agent.command import run_and_leave

def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
        {last}

run_and_leave(main, interruptible={interruptible})
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("interruptible", "last", "printed"),
    [(False, "pass", "interrupted\n"), (True, "pass", "cleaned up\ninterrupted\n"),
     (True, "return 130", "cleaned up\n"), (True, "raise OSError", "cleaned up\ninterrupted\n")],
)  # fmt: skip
def test_signals_while_main_runs(interruptible: bool, last: str, printed: str, number: int) -> None:
    """One that main handles itself has the right status too; an error that an interrupt became is none."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN.format(interruptible=interruptible, last=last)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (128 + number, printed)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As the interrupts of a shell's background jobs."""
    done = subprocess.run(
        ["/bin/sh", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable,
         "from agent.command import run_and_leave\nimport os, signal\n"
         "run_and_leave(lambda: os.kill(os.getpid(), signal.SIGINT) or 7)"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


@pytest.mark.parametrize("name", ["INT", "HUP"])
def test_nohup_and_background_jobs_are_heeded_inside_a_context_too(name: str) -> None:
    """``nohup`` has a trial go on when its terminal is gone; SIGTERM reaches it as ever."""
    code = f"""
import os, signal
from diffusion_core.signals import signal_handler
came = []
with signal_handler((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), came.append):
    os.kill(os.getpid(), signal.SIG{name})
    os.kill(os.getpid(), signal.SIGTERM)
print(came == [signal.SIGTERM], signal.getsignal(signal.SIG{name}) == signal.SIG_IGN)
"""
    words = ["/bin/sh", "-c", f'trap "" {name}; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "True True\n"


def test_a_library_s_import_handles_no_signals() -> None:
    code = "import signal, agent.command; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "True\n"
