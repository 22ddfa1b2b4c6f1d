"""Signals become a request to stop: the step is finished, a checkpoint written, and the run ended or handed back."""

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
"""Signals that follow one another more closely than this are one request: agents and clients may each send one."""

VERDICT_WITHIN_S = 12.0
"""How long a stopping trial waits to learn why: cluster managers allow some 30 s from SIGTERM to SIGKILL."""


class Stopped(Exception):
    """Training stopped between two steps because a signal asked for it.

    Attributes:
        ended: whether this is the end of the run; else it was preempted, and goes on elsewhere.
        signal_code: 128 + the signal's number, as shells count.
    """

    def __init__(self, number: int, ended: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.ended = ended
        self.signal_code = 128 + number


class StopRequest:
    """Whether a signal asked this process to stop.

    Args:
        agree: turns this process's signal number (0: none came) into the one that all processes of the trial act on,
            after the same step; called after every step.
    """

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self.number = 0
        self.agree = agree
        self.asked_to_end: Callable[[], bool] = lambda: False
        """Whether the run is to end for good; may take a while, and is called on a thread of its own."""
        self.mark_preempting: Callable[[], None] = lambda: None
        """Tells the server that the run will want to go on elsewhere; called as soon as a signal came, never before: a
        run that fails by itself must not be handed back."""
        self._ended = False
        self._came_at = 0.0
        self._judged = threading.Event()
        self._wake: int | None = None

    def _handle(self, number: int) -> None:
        if self.number and time.monotonic() - self._came_at > SAME_REQUEST_S:
            raise KeyboardInterrupt  # Whoever asks again does not wait for the step.
        self.ask(number)

    def ask(self, number: int = signal.SIGINT) -> None:
        """Stop as if that signal had come, for the first time: what W&B's client calls, besides the agent's signal."""
        if not self.number:
            self.number, self._came_at = number, time.monotonic()
            if self._wake is not None:
                os.write(self._wake, b"!")  # All else may wait for a lock that this very thread holds.

    def _judge(self, woken: int) -> None:
        """On a thread of its own, since a step may take longer than a cluster manager waits."""
        told = os.read(woken, 1)
        os.close(woken)
        if told == b"!":
            self._ended = self.asked_to_end()
            if not self._ended:
                self.mark_preempting()
        self._judged.set()

    def check(self, _state: TrainState, _row: dict[str, Any]) -> None:
        """A training callback: raises :class:`Stopped` after a step in which a signal came to any process."""
        number = self.agree(self.number)
        if number:
            if not self.number:  # It came to another process only.
                self.ask(number)
            if self._wake is not None:
                self._judged.wait(VERDICT_WITHIN_S)
            raise Stopped(number, ended=bool(self.agree(int(self._ended))))

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle signals inside this context; the old handlers come back after it."""
        woken, self._wake = os.pipe()
        judge = threading.Thread(target=self._judge, args=(woken,), name="stop-cause", daemon=True)
        judge.start()
        try:
            with signal_handler(SIGNALS, self._handle):
                yield self
        finally:
            os.close(self._wake)
            self._wake = None
