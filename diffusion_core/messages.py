"""Shorten errors for messages of one line."""

from __future__ import annotations

MOST_CHARACTERS = 300


def one_line(error: object) -> str:
    """Return an error's text in one line of at most ``MOST_CHARACTERS``; the error's type if it has no text."""
    return " ".join(str(error).split())[:MOST_CHARACTERS] or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return why an operation failed: the system's words for an ``OSError``, else the error in one line."""
    return (isinstance(error, OSError) and error.strerror) or one_line(error)
