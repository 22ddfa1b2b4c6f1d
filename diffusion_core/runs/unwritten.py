"""Go on where a run's folder cannot be written any more, as at the end of a trial on a full disk, and say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_core.config import ConfigError
from diffusion_core.files import DISK_FULL
from diffusion_core.machine.jobs import NO_SPACE
from diffusion_core.messages import reason_of
from diffusion_core.terminal.progress import say


@contextmanager
def or_told(what: str) -> Iterator[list[int]]:
    """Print in one line that a file cannot be written, or read, inside this context, and go on behind it.

    Args:
        what: what follows from that.

    Yields:
        A list, to which the exit status is added that this means.
    """
    statuses: list[int] = []
    try:
        yield statuses
    except (OSError, ConfigError) as error:
        say(f"error: {what}: {reason_of(error)}")
        statuses.append(NO_SPACE if isinstance(error, OSError) and error.errno in DISK_FULL else 1)


def unwritten(error: OSError, folder: Path) -> str:
    """Return the error in one line for the user: the file, or else the run's folder, why, and what to do."""
    hint = "free some space" if error.errno in DISK_FULL else "make it writable, or copy the run to another folder"
    return f"{str(error.filename or folder)!r}: {reason_of(error)}; {hint}"
