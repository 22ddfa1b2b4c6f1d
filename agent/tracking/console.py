"""Record what a process prints, without API keys."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from diffusion_core.redact import redact, redacted


@contextmanager
def redacted_arguments() -> Iterator[None]:
    """Within this context the process's command line, which W&B records, holds no key."""
    arguments = sys.argv
    sys.argv = redacted(arguments)
    try:
        yield
    finally:
        sys.argv = arguments


class Tee:
    """A stream that also hands each finished line, redacted, to a sink; of a progress bar its last state alone."""

    def __init__(self, stream: TextIO, sink: Callable[[str], None]) -> None:
        self._stream = stream
        self._sink = sink
        self._line = ""

    def write(self, text: str) -> int:
        """Write to the stream, and pass each finished line to the sink with its keys redacted."""
        written = self._stream.write(text)
        *lines, rest = (self._line + text).split("\n")
        for line in lines:
            self._sink(redact(line.rstrip("\r").rpartition("\r")[2]))
        self._line = rest[rest.rfind("\r", 0, -1) + 1 :]
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def recorded_console(sink: Callable[[str], None]) -> Iterator[None]:
    """Within this context every line that is printed also goes to ``sink``, without keys."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Tee(out, sink), Tee(err, sink)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
