"""End commands: report unusable input in one line, and exit without waiting for interpreter teardown."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_and_leave(main: Callable[[], int]) -> NoReturn:
    """Call ``main`` and exit with the status that it returns, without waiting for interpreter teardown.

    Teardown takes about a second, because the interpreter frees the objects of PyTorch's compiler one by one. Threads,
    the exit handlers that ``main`` registered (such as W&B's) and the flush of output still run first. An exception
    of ``main`` ends the process in the usual way.
    """
    status: int | None = None

    def exit_at_once() -> None:  # Handlers run in reverse order: this one after those of main.
        if status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    atexit.register(exit_at_once)
    status = main()
    sys.exit(status)


def fail(message: str) -> int:
    """Print an error in one line on stderr; return 2, the exit status of unusable input."""
    print(f"error: {message}", file=sys.stderr)
    return 2
