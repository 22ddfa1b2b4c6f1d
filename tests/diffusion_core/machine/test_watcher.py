"""What a killed process had started ends, also behind a shell, which passes no signal on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import ROOT, until

PARENT = """
import os, sys, time
from pathlib import Path
from diffusion_core.machine import watcher
from diffusion_core.machine.processes import start_process
watcher.GRACE_SECONDS = {grace}
watcher.LOOK_EVERY_S = 0.2
ended = start_process(["/bin/true"], dict(os.environ))
ended.wait()
start_process({command!r}, dict(os.environ), Path("lock"))
Path("parent").write_text(str(os.getpid()))
time.sleep(600)
"""
CHILD = """
import os, signal, subprocess, sys, time
stop = []
{on_term}
helper = subprocess.Popen([sys.executable, "-S", "-c",
    "import signal, time; signal.signal(15, lambda *_: open('helper-told', 'w').close()); time.sleep(600)"])
open(f"child.partial", "w").write(f"{{os.getpid()}} {{helper.pid}}")
os.rename("child.partial", "child")
while not stop:
    time.sleep(0.01)
time.sleep(1.0)  # Writes its checkpoint.
open("saved", "w").close()
helper.kill()
"""
TERM = "signal.signal(signal.SIGTERM, lambda *_: stop.append(1))"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
DIRECT = [sys.executable, "-S", "child.py"]
SHELL = ["/bin/sh", "-c", f"{sys.executable} -S child.py; true"]
GROUP = [sys.executable, "-S", "-c", "import subprocess, sys\nsubprocess.Popen([sys.executable, '-S', 'child.py'], "
         "process_group=0).wait()"]  # fmt: skip
"""As W&B's agent starts a trial."""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def family(folder: Path, command: list[str], on_term: str, grace: float) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A parent in a folder that has started a command; the ids of the child behind it and of the child's helper."""
    (folder / "child.py").write_text(CHILD.format(on_term=on_term))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(command=command, grace=grace)],
        cwd=folder,
        env=dict(os.environ) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    until(lambda: (folder / "child").exists() and (folder / "parent").exists())
    return parent, [int(word) for word in (folder / "child").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "command", [[sys.executable, "-S", "child.py"], SHELL, GROUP], ids=["direct", "shell", "group"]
)
def test_orphans_end_and_save_before(tmp_path: Path, command: list[str]) -> None:
    parent, (child, helper) = family(tmp_path, command, TERM, 300.0)
    time.sleep(0.5)
    assert alive(child)
    parent.send_signal(signal.SIGKILL)
    parent.communicate(timeout=10)  # Nobody who waits for the output waits for the orphans.
    until(lambda: not alive(child))
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "helper-told").exists()
    until(lambda: not alive(helper))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_an_orphan_that_does_not_end_is_killed(tmp_path: Path) -> None:
    parent, both = family(tmp_path, SHELL, STUBBORN, 1.5)
    parent.send_signal(signal.SIGKILL)
    parent.communicate(timeout=10)
    until(lambda: not any(map(alive, both)))
    assert not (tmp_path / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_watcher_leaves_with_the_process(tmp_path: Path) -> None:
    parent, both = family(tmp_path, SHELL, TERM, 300.0)
    watchers = [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if stat.parent.name != str(parent.pid) and _parent_of(stat) == parent.pid and int(stat.parent.name) not in both
    ]
    os.kill(both[0], signal.SIGTERM)
    until(lambda: not any(map(alive, both)))
    parent.send_signal(signal.SIGTERM)
    parent.communicate(timeout=10)
    until(lambda: not any(map(alive, watchers)))


def _parent_of(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
