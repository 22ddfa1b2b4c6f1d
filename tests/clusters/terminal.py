"""A command in a terminal of its own: what it shows, and keys that are typed."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

WITHIN_S = 60.0
SIZE = struct.pack("HHHH", 30, 100, 0, 0)
"""Rows and columns."""


class Terminal:
    """The terminal of a process.

    Attributes:
        process: what runs in it.
        text: all that was shown so far, with its escape sequences.
    """

    def __init__(self, process: subprocess.Popen[bytes], keyboard: int) -> None:
        self.process = process
        self.text = ""
        self._keyboard = keyboard

    def read(self, within_s: float) -> None:
        """Take over what is shown within some time."""
        if select.select([self._keyboard], [], [], within_s)[0]:
            with suppress(OSError):  # Nobody has the other end any more.
                self.text += os.read(self._keyboard, 65536).decode(errors="replace")

    def write(self, keys: bytes) -> None:
        """Type some keys."""
        os.write(self._keyboard, keys)

    def wait_for(self, pattern: str) -> None:
        """Wait until something is shown; escape sequences are left out."""
        end = time.monotonic() + WITHIN_S
        while not re.search(pattern, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.text), re.DOTALL):
            assert time.monotonic() < end, self.text
            self.read(0.1)


@contextmanager
def in_terminal(command: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator[Terminal]:
    """Run a command in a terminal of 100 columns. It is killed at the end."""
    keyboard, screen = os.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, SIZE)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(screen)
    terminal = Terminal(process, keyboard)
    try:
        yield terminal
        while process.poll() is None:
            terminal.read(0.1)
        terminal.read(0.1)
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)
