"""Stop training on a signal: finish the step, write a checkpoint, and end the run or hand it back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusion_core.signals import signal_handler
from diffusion_core.training.trainer import TrainState

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_REQUEST_S = 3.0
"""Signals within this many seconds are one request: agents and clients may each send one."""

VERDICT_WITHIN_S = 12.0
"""Seconds that a stopping trial waits to learn why. Cluster managers allow about 30 s from SIGTERM to SIGKILL."""


class Stopped(Exception):
    """A signal stopped training between two steps.

    Attributes:
        ended: whether the run is over. If not, it was preempted and resumes elsewhere.
        signal_code: 128 + the signal's number, as in shells.
        together: whether all processes stop here. If not, others may wait for this one in a collective operation.
    """

    def __init__(self, number: int, ended: bool = False, *, together: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.ended = ended
        self.together = together
        self.signal_code = 128 + number


class StopRequest:
    """Whether a signal asked this process to stop.

    Args:
        agree: maps this process's signal number (0: none) to the number that all processes act on after the same step.
            It is called after every step.
    """

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self.number = 0
        self.agree = agree
        self.asked_to_end: Callable[[], bool] = lambda: False
        """Whether the run is to end for good. It may take a while, and is called on its own thread."""
        self.mark_preempting: Callable[[], None] = lambda: None
        """Tell the server that the run will resume elsewhere. It is called after a signal only: a run that fails must
        not be handed back."""
        self._known = threading.Event()
        self._known.set()
        self._at_once = False
        self._ended = False
        self._came_at = 0.0
        self._judged = threading.Event()
        self._wake: int | None = None

    def _handle(self, number: int) -> None:
        if self.number and time.monotonic() - self._came_at > SAME_REQUEST_S:
            raise KeyboardInterrupt  # A second request: do not wait for the step.
        self.ask(number)
        if self._at_once:
            raise Stopped(number)

    def ask(self, number: int = signal.SIGINT) -> None:
        """Request a stop as if a first signal had come. W&B's client calls this besides the agent's signal."""
        if not self.number:
            self.number, self._came_at = number, time.monotonic()
            if self._wake is not None:
                os.write(self._wake, b"!")  # Anything else may wait for a lock that this thread holds.

    def _judge(self, woken: int) -> None:
        """Find out why, on a thread: a step may take longer than a cluster manager waits."""
        told = os.read(woken, 1)
        os.close(woken)
        if told == b"!":
            self._known.wait()
            self._ended = self.asked_to_end()
            if not self._ended:
                self.mark_preempting()
        self._judged.set()

    def check(self, _state: TrainState, _row: dict[str, Any]) -> None:
        """A training callback: raise :class:`Stopped` after a step in which any process received a signal."""
        number = self.agree(self.number)
        if number:
            if not self.number:  # Another process received it.
                self.ask(number)
            if self._wake is not None:
                self._judged.wait(VERDICT_WITHIN_S)
            raise Stopped(number, ended=bool(self.agree(int(self._ended))), together=True)

    def check_now(self) -> None:
        """Raise :class:`Stopped` if this process received a signal before there was a step."""
        if self.number:
            raise Stopped(self.number)

    def later(self) -> None:
        """Do not ask why a signal came, nor hand the run back, before :meth:`ready`: there is no run yet."""
        self._known.clear()

    def ready(self) -> None:
        """From now on :attr:`asked_to_end` and :attr:`mark_preempting` reach the run."""
        self._known.set()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside this context a signal raises :class:`Stopped` where it arrives, instead of after a step."""
        self.check_now()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle signals inside this context, and restore the previous handlers afterwards."""
        woken, self._wake = os.pipe()
        judge = threading.Thread(target=self._judge, args=(woken,), name="stop-cause", daemon=True)
        judge.start()
        try:
            with signal_handler(SIGNALS, self._handle):
                yield self
        finally:
            os.close(self._wake)
            self._wake = None
