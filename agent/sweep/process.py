"""Processes that a sweep starts: trials offline, agents online. None outlives the sweep, however that ends."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffusion_core.signals import signal_handler

LOCK_FILE = ".process"
"""In a trial's folder: locked for as long as a process of the trial lives, and holds that process's id."""

LOG_FILE = "console.log"
"""In a trial's folder: what it printed, where several trials share the screen."""

ORPHAN_GRACE_SECONDS = 300.0
"""How long the trial of a sweep that was killed may take to write its checkpoint before it is killed as well."""

ARGS_MACRO = "${args}"
MACROS = ("${env}", "${interpreter}", "${program}", ARGS_MACRO)
"""What a sweep's command may say, besides ``${envvar:NAME}``."""

ENVIRONMENT_MACRO = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def expand_command(command: Iterable[Any], arguments: Sequence[str], program: str | None = None) -> list[str]:
    """A sweep's command with its macros filled in, as ``wandb agent`` does."""
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [program] if program else [],
        ARGS_MACRO: arguments,
    }
    words: list[str] = []
    for word in map(str, command):
        word = ENVIRONMENT_MACRO.sub(lambda match: os.environ.get(match[1], match[1]), word)
        words += macros.get(word, [word])
    return words


def start_process(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None, log: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that gets a SIGTERM when this one dies (on Linux), even of a SIGKILL.

    Args:
        command: its words.
        environment: all its variables.
        folder: a trial's folder, whose lock the process will hold; None for one that is no trial.
        log: file that its output is appended to; None leaves it on the screen.

    Raises:
        OSError: if there is no such program.
    """
    lock = None if folder is None else _lock(folder)
    output = None if log is None else log.open("ab")
    parent = os.getpid()

    def before_program() -> None:
        if _LIBC is not None:
            _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # It died before it was asked for.
                os._exit(1)
        if lock is not None:
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)

    try:
        return subprocess.Popen(
            command,
            env=environment,
            # In a process group of its own, or Ctrl-C would reach it twice: from the terminal and from here. The
            # terminal's input is not for such a group.
            process_group=0,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            pass_fds=() if lock is None else (lock,),
            preexec_fn=before_program,
        )
    finally:
        if output is not None:
            output.close()
        if lock is not None:
            os.close(lock)  # The lock stays with the process, which inherited it.


def _lock(folder: Path) -> int:
    """The descriptor of a trial's lock, held. Raises BlockingIOError if a process of the trial lives."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def end_orphan(folder: Path) -> None:
    """Wait until no process of a trial lives that an earlier sweep process, now dead, had started.

    It was asked to end when its parent died, and is writing its checkpoint; one that does not end is killed.
    """
    deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
    asked = _LIBC is not None
    while True:
        try:
            os.close(_lock(folder))
            return
        except BlockingIOError:
            number = int((folder / LOCK_FILE).read_text(encoding="utf-8") or 0)
        if number and not asked:
            asked = True
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGTERM)
        if number and time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)
        time.sleep(0.1)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def forward_signals(processes: Callable[[], Iterable[subprocess.Popen[bytes]]]) -> Iterator[list[int]]:
    """Forward SIGINT, SIGTERM and SIGHUP to other processes inside this context.

    Args:
        processes: returns the processes; called whenever a signal arrives.

    Yields:
        The numbers of the signals that arrived.
    """
    received: list[int] = []

    def forward(number: int) -> None:
        received.append(number)
        for process in processes():
            process.send_signal(number)

    with signal_handler((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), forward):
        yield received
