"""Words for messages: errors in one line and without secrets, lengths of time, sizes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NoReturn

from diffusion_core.redact import redact

MOST_CHARACTERS = 300


class UserError(ValueError):
    """An error whose text is for the user. The text names wrong values, but shows no secrets."""

    def __str__(self) -> str:
        return redact(super().__str__())


class Parser(argparse.ArgumentParser):
    """A parser of the command line whose errors show no secrets."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit."""
        super().error(redact(message))


def one_line(error: object) -> str:
    """Return an error's text in one line of at most ``MOST_CHARACTERS``, without secrets; its type without a text."""
    return redact(" ".join(str(error).split()))[:MOST_CHARACTERS] or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return why an operation failed: the system's words for an ``OSError``, else the error in one line."""
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def shortened(value: object) -> str:
    """Return a value for a message, without secrets and cut to ``MOST_CHARACTERS``."""
    text = redact(repr(value))
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def printable(text: str) -> str:
    """Escape the characters of a name that a terminal cannot show on one line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def listed(words: Iterable[str], most: int) -> str:
    """Return words with commas between them, and the number of those after the first ``most``."""
    known = list(words)
    return ", ".join(known[:most]) + (f" and {len(known) - most:,} more" if len(known) > most else "")


def counted(number: int, what: str) -> str:
    """Return a number and what it counts, whose plural takes an s: ``1 image``, ``1,200 images``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a length of time in words: ``34 s``, ``5 min``, ``7.5 h``, ``12 days``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"


def size_in_words(number: float) -> str:
    """Return bytes in words: ``12 MB``, ``3.4 GB``."""
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 1000:
            return f"{number:.3g} {unit}"
    return f"{number / 1000:,.3g} TB"
