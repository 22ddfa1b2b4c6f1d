"""A table on stdout that is drawn again in its place while things change. Only in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Self

from diffusion_core.tables import text_table


class LiveTable:
    """A table below what is printed meanwhile. It is gone when its context ends.

    Elsewhere than in a terminal nothing is drawn, so what a reader of a file must know is printed as lines as well.
    """

    def __init__(self) -> None:
        self._live: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def show(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Draw the table with other content. More rows than the terminal has are cut off."""
        if not sys.stdout.isatty():
            return
        from rich.live import Live  # Slow to import.
        from rich.text import Text

        if self._live is None:
            self._live = Live(auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Text.from_ansi(text_table(columns, rows)), refresh=True)

    def close(self) -> None:
        """Remove the table."""
        if self._live is not None:
            self._live.stop()
            self._live = None
