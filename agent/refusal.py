"""How commands refuse unusable input."""

from __future__ import annotations

import sys


def fail(message: str) -> int:
    """One line for the user on stderr; the exit status of unusable input."""
    print(f"error: {message}", file=sys.stderr)
    return 2
