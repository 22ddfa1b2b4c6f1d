"""End what this process started when it is gone, also behind a shell or an agent that does not pass signals on.

A process that this one starts receives SIGTERM when this one dies (:mod:`diffusion_core.machine.processes`). A shell
then ends and leaves its command behind. A small process of its own, the watcher, ends such orphans. It learns that this
process is gone when a pipe closes, which no kill can prevent.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from diffusion_core.signals import ignore

GRACE_SECONDS = 300.0
"""Seconds that an orphan may take to write its checkpoint before it is killed."""
LOOK_EVERY_S = 5.0
"""Seconds between two looks for sessions that have ended, so that a later process with such an id is left alone."""
HURRY_S = 0.5
"""Seconds between two looks when the process is gone."""

_NUMBER = struct.Struct("q")
_watcher: tuple[int, int] | None = None
"""The process that started the watcher, and the end of the pipe to it."""


class Member(NamedTuple):
    """A process of a session: its id, its parent's, and its session's."""

    pid: int
    parent: int
    session: int


def watch(leader: int) -> None:
    """Let the watcher end what is left of a session when this process is gone. Only on Linux.

    Args:
        leader: the session's leader, a child of this process. It ends by itself.
    """
    global _watcher
    if sys.platform != "linux":
        return
    if _watcher is None or _watcher[0] != os.getpid():
        _watcher = os.getpid(), _start()
    with suppress(BrokenPipeError):  # Somebody killed the watcher.
        os.write(_watcher[1], _NUMBER.pack(leader))


def _start() -> int:
    """Fork the watcher. Return the end of the pipe to it."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        with suppress(BaseException):
            _be_watcher(reading)
        os._exit(0)
    os.close(reading)
    return writing


def _be_watcher(pipe: int) -> None:
    os.setsid()
    ignore((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    os.dup2(pipe, 0)  # Keep nothing else open: no lock, and no terminal or pipe that a reader waits for.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    sessions: set[int] = set()
    while True:
        if select.select([0], [], [], LOOK_EVERY_S if sessions else None)[0]:
            content = os.read(0, _NUMBER.size)
            if len(content) < _NUMBER.size:
                break
            sessions.add(*_NUMBER.unpack(content))
        elif sessions:
            sessions &= {member.session for member in _members()}
    _end_orphans(sessions)


def _end_orphans(sessions: set[int]) -> None:
    """Tell the orphans of sessions to end, and kill what is left after the grace period."""
    deadline = time.monotonic() + GRACE_SECONDS
    told = set(sessions)  # The leaders were told when their parent died.
    while left := [member for member in _members() if member.session in sessions]:
        ids = {member.pid for member in left}
        late = time.monotonic() > deadline
        for member in left:
            # A process with a parent in the session is that one's business, such as W&B's service of a trial.
            if late or (member.pid not in told and member.parent not in ids):
                told.add(member.pid)
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(member.pid, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(HURRY_S)


def _members() -> Iterator[Member]:
    """Yield the processes of this machine that run."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
                if fields[0] not in ("Z", "X"):
                    yield Member(int(name), int(fields[1]), int(fields[3]))
