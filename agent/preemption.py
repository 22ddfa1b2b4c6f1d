"""Signals become a request to stop: the step is finished, a checkpoint written, and the run handed back."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusion_core.trainer import TrainState

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_REQUEST_S = 3.0
"""Signals that follow one another more closely than this are one request: agents and clients may each send one."""


class Preempted(Exception):
    """Training stopped between two steps because a signal asked for it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """Whether a signal asked this process to stop."""

    def __init__(self, on_request: Callable[[], None] | None = None) -> None:
        self.number: int | None = None
        self.came_at = 0.0
        self.on_request = on_request

    def _handle(self, number: int, _frame: Any) -> None:
        if self.number is not None:
            if time.monotonic() - self.came_at > SAME_REQUEST_S:  # Whoever asks again does not wait for the step.
                raise KeyboardInterrupt
            return
        self.number, self.came_at = number, time.monotonic()
        if self.on_request is not None:
            self.on_request()

    def check(self, _state: TrainState, _row: dict[str, Any]) -> None:
        """A training callback: raises :class:`Preempted` after a step in which a signal came."""
        if self.number is not None:
            raise Preempted(self.number)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle signals inside this context; the old handlers come back after it."""
        old = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
