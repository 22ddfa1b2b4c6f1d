"""Handle signals: inside a context, and before a command has handlers of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
OF_TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""Signals of a terminal. They stay ignored where ``nohup``, or a shell's background job, ignores them."""


@contextmanager
def signal_handler(numbers: Iterable[int], handle: Callable[[int], object]) -> Iterator[None]:
    """Call ``handle(number)`` for each signal that arrives inside this context; then restore the old handlers.

    Args:
        numbers: the signals to handle, but for those of :data:`OF_TERMINAL` that this process ignores.
        handle: runs on the main thread, between two instructions of the code that the signal interrupts.
    """
    heeded = [number for number in numbers if number not in OF_TERMINAL or signal.getsignal(number) != signal.SIG_IGN]
    old = {number: signal.signal(number, lambda number, _frame: handle(number)) for number in heeded}
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


def ignore(numbers: Iterable[int]) -> None:
    """Ignore signals for the rest of this process."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def leave_at_once(*, of_trial: bool = False) -> None:
    """From now on, on SIGINT or SIGTERM, print one line and exit with 128 + the signal's number, without clean-up.

    Commands call this before slow imports. An exception in the middle of an import shows as a traceback, or as another
    error. A signal that is ignored, as SIGINT in a shell's background jobs, stays ignored.

    Args:
        of_trial: whether this process runs a trial: :func:`remember_if_handed_out` before a signal can come.
    """
    if of_trial:
        remember_if_handed_out()
    for number in heeded_interrupts():
        signal.signal(number, _leave)


def heeded_interrupts() -> list[signal.Signals]:
    """Return those of SIGINT and SIGTERM that this process does not ignore."""
    return [number for number in INTERRUPTS if signal.getsignal(number) is not signal.SIG_IGN]


def remember_if_handed_out() -> None:
    """In a trial of a W&B agent, do not leave on SIGTERM, but remember it until :func:`remembered` is called.

    W&B must be told that the trial is handed back, or the sweep loses it. That takes a few imports.
    """
    if "WANDB_SWEEP_ID" in os.environ:
        _to_remember.add(signal.SIGTERM)


def remembered() -> list[int]:
    """Return the signals that came since :func:`remember_if_handed_out`. From now on, they are not remembered."""
    _to_remember.clear()
    return _came


_to_remember: set[int] = set()
_came: list[int] = []


def _leave(number: int, _frame: FrameType | None) -> None:
    if number in _to_remember:
        _came.append(number)
        return
    os.write(2, b"interrupted\n")  # Not print: the signal may have come in the middle of one.
    os._exit(128 + number)
