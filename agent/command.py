"""How commands end: one line and a status for unusable input, and a fast exit."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from diffusion_core.redact import redact
from diffusion_core.signals import heeded_interrupts, leave_at_once, signal_handler

INTERRUPTED = 130
UNUSABLE = 2
"""Exit status of a command that cannot use its input."""


def run_and_leave(main: Callable[[], int], *, interruptible: bool = False) -> NoReturn:
    """Call ``main`` and exit with the status that it returns, without waiting for interpreter teardown.

    Teardown takes a second: it frees, object by object, what PyTorch's compiler made when it was imported. Exit
    handlers registered by ``main`` (such as W&B's) run first, output is flushed, and threads are joined. An exception
    from ``main`` ends the process as usual.

    SIGINT and SIGTERM end the process with one line, and status 130 or 143, unless ``main`` handles them.

    Args:
        main: the command.
        interruptible: whether the signals raise KeyboardInterrupt in ``main``, which then cleans up. If not, they end
            the process at once.
    """
    status: int | None = None
    received: list[int] = []
    leave_at_once()

    def interrupt(number: int) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    def leave() -> None:  # Handlers run in reverse order: this one after all of main's.
        if status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    atexit.register(leave)
    with signal_handler(heeded_interrupts() if interruptible else (), interrupt):
        try:
            status = main()
        except BaseException:
            if not received:  # A library may turn the interrupt into another error.
                raise
            print("interrupted", file=sys.stderr)
            status = INTERRUPTED
    if status == INTERRUPTED and received:
        status = 128 + received[-1]
    sys.exit(status)


def fail(message: str) -> int:
    """Print one line for the user on stderr. Return the exit status of unusable input."""
    print(f"error: {redact(message)}", file=sys.stderr)
    return UNUSABLE
