"""Tables as text: for the terminal, fitted to its width, and in Markdown."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

LINES = "    \n    \n -- \n    \n    \n    \n    \n    \n"
"""The lines of a rich box: only one of dashes below the head."""

WIDEST = 10_000
"""Characters of a line where no terminal limits it."""


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Return a table for stdout.

    In a terminal, cells wrap so that the table fits the width, and the head is bold unless NO_COLOR is set. In a file
    or a pipe it is plain text with one line a row.

    Args:
        columns: the head.
        rows: cells, as many as there are columns.
        right: align all columns but the first to the right.
    """
    from rich.box import Box  # rich is slow to import, and most commands print no table.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    styled = terminal and not os.environ.get("NO_COLOR")
    table = Table(
        box=Box(LINES, ascii=True), show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    for index, column in enumerate(columns):
        table.add_column(Text(column), overflow="fold", justify="right" if right and index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(
        file=io.StringIO(),
        width=None if terminal else WIDEST,
        color_system="standard" if styled else None,
        force_terminal=styled,
    )
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown; a ``|`` inside a cell is escaped."""
    escaped = [[text.replace("|", "\\|") for text in line] for line in (columns, *rows)]
    head, *body = [f"| {' | '.join(line)} |" for line in escaped]
    return [head, "|---" * len(columns) + "|", *body]


def cell(value: Any) -> str:
    """Return a value as a cell's text: numbers in few digits, a missing value as ``-``."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def mean_and_range(values: Sequence[float], form: str) -> str:
    """Return such as ``0.98 (0.97 to 0.99)``, or the value alone if there is only one."""
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):{form}}{spread}"
