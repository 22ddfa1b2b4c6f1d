"""Start processes that do not outlive this one, and of which at most one at a time works in a folder."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusion_core.machine.watcher import GRACE_SECONDS, watch
from diffusion_core.signals import signal_handler

LOCK_FILE = ".process"
"""A file in a process's folder that is locked while the process lives. It holds the process's id and its host."""

ORPHAN_GRACE_SECONDS = GRACE_SECONDS
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Let this process receive a signal when its parent dies, even from SIGKILL (on Linux). Call it after a fork.

    Args:
        parent: the parent's process id.
        number: the signal.
    """
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # The parent died before the request.
            os._exit(1)


def start_process(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None, log: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that receives SIGTERM when this one dies, even from SIGKILL (on Linux).

    What the process starts, such as the command of a shell, ends as well: see :mod:`diffusion_core.machine.watcher`.

    Args:
        command: its words.
        environment: all its variables.
        folder: a folder whose lock the process holds; None: no lock.
        log: file to append its output to; None: the terminal.

    Raises:
        OSError: if the program does not exist.
    """
    lock = None if folder is None else _lock(folder)
    output = None if log is None else log.open("ab")
    parent, host = os.getpid(), socket.gethostname()

    def before_program() -> None:
        end_with_parent(parent)
        if lock is not None:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} {host}".encode(), 0)

    try:
        process = subprocess.Popen(
            command,
            env=environment,
            # Use a new session: otherwise Ctrl-C arrives twice, from the terminal and from this process. A session also
            # keeps together what the process starts. It cannot read from the terminal.
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            pass_fds=() if lock is None else (lock,),
            preexec_fn=before_program,
        )
        watch(process.pid)
        return process
    finally:
        if output is not None:
            output.close()
        if lock is not None:
            os.close(lock)  # The process inherited the lock and keeps it.


def _lock(folder: Path) -> int:
    """Lock a folder. Return the descriptor of the lock. Raise BlockingIOError if a process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def end_orphan(folder: Path) -> None:
    """Wait until the process that works in a folder ends, if its parent died.

    It received SIGTERM when its parent died, and is writing its checkpoint. It is killed if it does not end in time,
    unless it runs on another host: its number is that of somebody else's process here.
    """
    deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
    asked = _LIBC is not None
    while True:
        try:
            os.close(_lock(folder))
            return
        except BlockingIOError:
            number = _owner(folder)
        if number and not asked:
            asked = True
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGTERM)
        if number and time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)
        time.sleep(0.1)


def began_at(folder: Path) -> float | None:
    """Return when the last process in a folder began, by the disk's clock; None if it is forgotten or unknown."""
    try:
        stat = (folder / LOCK_FILE).stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime if stat.st_size else None


def forget_process(folder: Path) -> None:
    """Forget the last process in a folder, which has ended and whose time is counted."""
    os.truncate(folder / LOCK_FILE, 0)


def _owner(folder: Path) -> int:
    """Return the id of the process of this host that works in a folder; 0 if it is unknown, or of another host.

    Files of older versions hold no host.
    """
    number, _, host = (folder / LOCK_FILE).read_text(encoding="utf-8").partition(" ")
    return int(number or 0) if host in ("", socket.gethostname()) else 0


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and all that it and its descendants started, in whatever sessions."""
    import psutil  # type: ignore[import-untyped]

    with suppress(psutil.Error):
        root = psutil.Process(pid)
        root.suspend()  # It must start nothing more.
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                process.kill()


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
