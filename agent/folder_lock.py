"""One process at a time works in a folder: a file that the operating system locks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Held(Exception):
    """Another process holds the lock; the message is its id, or ``unknown``."""


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold a lock. It ends with the process, however that ends; what is left of the file means nothing.

    Raises:
        Held: if another process holds it.
        OSError: if the file cannot be written.
    """
    with file.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Held(lock.read().strip() or "unknown") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
