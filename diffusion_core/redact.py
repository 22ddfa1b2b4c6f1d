"""Redact API keys from everything that is recorded."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

BLANK = "[redacted]"
SECRET_NAMES = re.compile(r"(API_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
"""Environment variables whose values are secrets."""

SHORTEST_SECRET = 8
"""Shorter values are switches (`HF_TOKEN=none`); redacting them would blank out ordinary words."""

KEYS = re.compile(
    r"(?<![0-9A-Za-z])(?:"
    r"[0-9a-f]{40}"  # W&B until 2025. Full git commit hashes match too.
    r"|wandb_v1_[0-9A-Za-z_-]{16,}"  # W&B.
    r"|hf_[0-9A-Za-z]{20,}"  # Hugging Face.
    r"|gh[opsu]_[0-9A-Za-z]{20,}|github_pat_\w{20,}"
    r"|sk-[0-9A-Za-z_-]{20,}"
    r"|AKIA[0-9A-Z]{16}"
    r")(?![0-9A-Za-z])"
)


def secrets_here() -> list[str]:
    """Return the values of this process's secret environment variables, longest first."""
    values = {value for name, value in os.environ.items() if SECRET_NAMES.search(name)}
    return sorted((value for value in values if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


def redact(text: str) -> str:
    """Return the text with secrets of the environment, and everything that looks like a key, blanked out."""
    return _redact(text, secrets_here())


def redacted(value: Any) -> Any:
    """Return a value, or a nested container of values, with keys blanked out in every text; tuples become lists."""
    return _redacted(value, secrets_here())


def _redact(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, BLANK)
    return KEYS.sub(BLANK, text)


def _redacted(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        return _redact(value, secrets)
    if isinstance(value, dict):
        return {_redacted(key, secrets): _redacted(entry, secrets) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(entry, secrets) for entry in value]
    return value


@contextmanager
def redacted_arguments() -> Iterator[None]:
    """Redact ``sys.argv``, which W&B records, inside this context."""
    arguments = sys.argv
    sys.argv = redacted(arguments)
    try:
        yield
    finally:
        sys.argv = arguments


class Tee:
    """A stream that also passes each finished line, redacted, to a sink. Of a progress bar it passes the last state."""

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
    """Pass every printed line to ``sink``, without keys, inside this context."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Tee(out, sink), Tee(err, sink)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
