"""How commands end: one line and a status for unusable input, and exit without teardown."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_and_leave(main: Callable[[], int]) -> NoReturn:
    """Call ``main``, and end this process with the status that it returns.

    The interpreter would take a second to clear away, object by object, what PyTorch's compiler made when it was
    imported. All exit handlers that were registered while ``main`` ran (W&B's, for one) are called first, output is
    flushed, and threads are waited for, as ever. What ``main`` raises ends the process as it does everywhere.
    """
    status: int | None = None

    def leave() -> None:  # Handlers are called in reverse order: this one after all of main's.
        if status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    atexit.register(leave)
    status = main()
    sys.exit(status)


def fail(message: str) -> int:
    """One line for the user on stderr; the exit status of unusable input."""
    print(f"error: {message}", file=sys.stderr)
    return 2
