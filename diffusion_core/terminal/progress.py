"""Show the progress of long work on stderr: a bar in a terminal, a line now and then in a file or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from tqdm import tqdm

from diffusion_core.messages import duration

T = TypeVar("T")

LINE_EVERY_S = 30.0
"""Seconds between two lines where no terminal shows a bar."""
BAR_EVERY_S = 0.5
"""Seconds between two updates of a bar."""


class Progress(Protocol):
    """What the loops that show progress need of a bar."""

    def update(self, n: int = 1) -> Any:
        """Add to what is done."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Show a text behind the numbers."""

    def close(self) -> None:
        """End it."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any: ...


class Lines:
    """Progress as lines, for what is not a terminal: a file would keep every state of a bar.

    Args:
        what: the work.
        total: its size.
        unit: what is counted.
        initial: what was done before.
    """

    def __init__(self, what: str, total: int, unit: str, initial: int = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.begun_at = self.done = initial
        self.started = self.said = time.monotonic()
        self.postfix = ""

    def update(self, n: int = 1) -> None:
        """Add to what is done. Print a line if the last one is old."""
        self.done += n
        now = time.monotonic()
        if now - self.said >= LINE_EVERY_S:
            self.said = now
            print(self.line(now - self.started), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Return how much is done, how fast, and how long the rest takes, after so many seconds."""
        rate = (self.done - self.begun_at) / seconds
        left = f", about {duration((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        behind = f", {self.postfix}" if self.postfix else ""
        units = f"{self.unit}es" if self.unit.endswith("ch") else f"{self.unit}s"
        return f"{self.what}: {self.done:,} of {self.total:,} {units}, {rate:.3g} a second{left}{behind}"

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set the text behind the numbers of the next line."""
        self.postfix = s

    def close(self) -> None:
        """End it without a further line."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def progress_of(what: str, total: int, unit: str, *, shown: bool, initial: int = 0, leave: bool = True) -> Progress:
    """Return the progress of some work.

    Args:
        what: the work, such as ``training``.
        total: its size.
        unit: what is counted, such as ``step``.
        shown: whether to show anything.
        initial: what was done before.
        leave: whether a bar stays when it is closed.
    """
    if shown and not sys.stderr.isatty():
        return Lines(what, total, unit, initial)
    bar: Progress = tqdm(
        total=total, desc=what, unit=unit, initial=initial, leave=leave, disable=not shown, mininterval=BAR_EVERY_S
    )
    return bar


class Shown(Generic[T]):
    """Iterates over items and shows how many were taken. For the arguments, see :func:`progress_of`."""

    def __init__(
        self, items: Iterable[T], what: str, total: int, unit: str, *, shown: bool, leave: bool = True
    ) -> None:
        self.items = items
        self.progress = progress_of(what, total, unit, shown=shown, leave=leave)

    def __iter__(self) -> Iterator[T]:
        with self.progress:
            for item in self.items:
                yield item
                self.progress.update()


def say(line: str) -> None:
    """Print a line on stderr, above the bars that are shown there."""
    if getattr(tqdm, "_instances", None):  # Only bars that are open. Without one, tqdm needs no lock.
        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)
