"""How commands end: one line and a status for unusable input, and a fast exit."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from diffusion_core.redact import redact

UNUSABLE = 2
"""Exit status of a command that cannot use its input."""


def run_and_leave(main: Callable[[], int]) -> NoReturn:
    """Call ``main`` and exit with the status that it returns, without waiting for interpreter teardown.

    Teardown takes a second: it frees, object by object, what PyTorch's compiler made when it was imported. Exit
    handlers registered by ``main`` (such as W&B's) run first, output is flushed, and threads are joined. An exception
    from ``main`` ends the process as usual.
    """
    status: int | None = None

    def leave() -> None:  # Handlers run in reverse order: this one after all of main's.
        if status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    atexit.register(leave)
    status = main()
    sys.exit(status)


def fail(message: str) -> int:
    """Print one line for the user on stderr. Return the exit status of unusable input."""
    print(f"error: {redact(message)}", file=sys.stderr)
    return UNUSABLE
