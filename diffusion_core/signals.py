"""Handle signals inside a context."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def signal_handler(numbers: Iterable[int], handle: Callable[[int], object]) -> Iterator[None]:
    """Call ``handle(number)`` for each signal that arrives inside this context; then restore the old handlers.

    Args:
        numbers: the signals to handle.
        handle: runs on the main thread, between two instructions of the code that the signal interrupts.
    """
    old = {number: signal.signal(number, lambda number, _frame: handle(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def ignore_interrupts() -> None:
    """Ignore SIGINT and let SIGTERM end this process: for a worker whose parent decides when to stop.

    Ctrl-C in a terminal sends SIGINT to all processes of a command, and a worker inherits its parent's handlers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
