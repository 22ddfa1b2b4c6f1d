"""Locks on a file system that several nodes share, where the locks of the system (flock) may not reach other nodes.

A lease is a file that names its holder: job id, host, process id. The holder touches it every few seconds. Whoever
wants a lease that exists asks Slurm about the holder's job. Where that is unknown, it watches whether the file changes,
unless the holder was a process of this host and is gone. A number may be that of another process by now.
Times are never compared: the clocks of nodes may differ by minutes.

A job that Slurm has given up may still run, for example if only the daemon of its node died, and a process may only
have been cut off from the file system. So the holder also reads its lease each time, and ends if another one took it.
Whoever takes it waits until the holder must have seen that.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffusion_core.files import replaced_file
from diffusion_core.machine.slurm.commands import own_job

BEAT_S = 10.0
"""Seconds between two touches."""

SILENT_S = 45.0
"""Seconds without a touch after which a holder of which nothing else is known is taken for dead."""

SETTLE_S = 1.0
"""Seconds between writing a lease and reading it again, which shows whether another process wrote it as well."""

EMPTY_S = 1.0
"""Seconds within which the process that has created a lease has written into it."""

FENCE_S = 30.0
"""Seconds after which a holder that lives has seen that its lease was taken, and has ended."""

MISSES = 2
"""Times in a row that a holder finds no lease before it takes it for lost."""


class Leased(Exception):
    """Another process holds the lease; the message names it."""


def describe(holder: dict[str, Any]) -> str:
    """Return a lease's holder in words: ``job 12 on node7``, ``process 34 on login1``."""
    who = f"job {holder['job']}" if holder.get("job") else f"process {holder.get('pid')}"
    return f"{who} on {holder.get('host')}"


@contextmanager
def leased(
    file: Path,
    is_active: Callable[[str], bool | None],
    notice: Callable[[str], object] = lambda text: None,
    lost: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Hold a lease inside this context.

    Args:
        file: the lease; its folder exists.
        is_active: whether the job of an id is under way; None: unknown.
        notice: told in one line if this has to wait for a while.
        lost: called once, on a thread, if another process took the lease: what runs in this context must end at once.

    Raises:
        Leased: if another process holds it.
        OSError: if the file cannot be written.
    """
    mine = {"job": own_job(), "host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
    holder = _read(file)
    if holder is not None and _is_held(file, holder, mine, is_active, notice):
        raise Leased(describe(holder))
    _take(file, holder, mine, notice)
    over = threading.Event()
    threading.Thread(target=_beat, args=(file, mine, over, lost), name="lease", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if _read(file) == mine:
            file.unlink(missing_ok=True)


def _beat(file: Path, mine: dict[str, Any], over: threading.Event, lost: Callable[[], object]) -> None:
    """Touch a lease every few seconds until it is over, or lost."""
    missing = 0
    while not over.wait(BEAT_S):
        with suppress(OSError):  # The next one may succeed.
            holder = _read(file)
            missing = 0 if holder else missing + 1
            if (holder and holder != mine) or missing >= MISSES:
                lost()
                return
            if holder:
                os.utime(file)


def _take(file: Path, holder: dict[str, Any] | None, mine: dict[str, Any], notice: Callable[[str], object]) -> None:
    """Write a lease in place of a dead holder's, or a new one. Raise Leased if another process was faster."""
    if (now := _read(file)) != holder:
        raise Leased(describe(now or {}))
    if holder is None:
        try:
            with file.open("x", encoding="utf-8") as new:
                json.dump(mine, new)
        except FileExistsError:
            raise Leased(describe(_read(file) or {})) from None
        except OSError:  # The disk is full: half a lease would hold up the next one.
            file.unlink(missing_ok=True)
            raise
        return
    with replaced_file(file, concurrent=True) as temporary, temporary.open("w", encoding="utf-8") as new:
        json.dump(mine, new)
    wait_s = SETTLE_S
    if holder.get("host") != mine["host"] or _is_alive(holder.get("pid")):
        notice(f"{file}: was held by {describe(holder)}; waiting {FENCE_S:.0f} s for its end")
        wait_s = FENCE_S
    _settle(file, mine, wait_s)


def _settle(file: Path, mine: dict[str, Any], seconds: float) -> None:
    """Wait some seconds, and touch the lease meanwhile. Raise Leased if another process wrote it as well."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, BEAT_S))
        if (now := _read(file)) != mine:
            raise Leased(describe(now or {}))
        with suppress(OSError):  # The next one may succeed.
            os.utime(file)


def _read(file: Path) -> dict[str, Any] | None:
    """Return the content of a lease; None if there is none. A damaged one has no job and no host.

    A process creates a lease and then writes into it, so an empty one is read again for a moment.
    """
    deadline = time.monotonic() + EMPTY_S
    try:
        while not (text := file.read_text(encoding="utf-8")) and time.monotonic() < deadline:
            time.sleep(0.01)
        content = json.loads(text)
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_held(
    file: Path,
    holder: dict[str, Any],
    mine: dict[str, Any],
    is_active: Callable[[str], bool | None],
    notice: Callable[[str], object],
) -> bool:
    """Return whether the holder of a lease lives."""
    job = holder.get("job")
    if job is not None:
        if job == mine["job"]:  # This job before it was requeued.
            return False
        if (active := is_active(job)) is not None:
            return active
    elif holder.get("host") == mine["host"] and not _is_alive(holder.get("pid")):
        return False
    notice(f"{file}: held by {describe(holder)}; watching for {SILENT_S:.0f} s whether that lives")
    first, deadline = _touched(file), time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENT_S / 10))
        if _touched(file) != first:
            return _read(file) is not None
    return False


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, TypeError):
        return False
    except PermissionError:
        pass
    return True


def _touched(file: Path) -> int:
    """Return when a file was touched; 0 if it is gone. Opened first: NFS then asks the server."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0
