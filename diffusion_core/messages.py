"""Words for messages: errors in one line, lengths of time, sizes."""

from __future__ import annotations

MOST_CHARACTERS = 300


def one_line(error: object) -> str:
    """Return an error's text in one line of at most ``MOST_CHARACTERS``; the error's type if it has no text."""
    return " ".join(str(error).split())[:MOST_CHARACTERS] or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return why an operation failed: the system's words for an ``OSError``, else the error in one line."""
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def shortened(value: object) -> str:
    """Return a value for a message, cut to ``MOST_CHARACTERS``."""
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def duration(seconds: float) -> str:
    """Return a length of time in words: ``34 s``, ``5 min``, ``7.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def size_in_words(number: float) -> str:
    """Return bytes in words: ``12 MB``, ``3.4 GB``."""
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 1000:
            return f"{number:.3g} {unit}"
    return f"{number / 1000:,.3g} TB"
