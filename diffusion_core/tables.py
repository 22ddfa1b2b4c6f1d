"""Tables as text: for the terminal, fitted to its width, and in Markdown."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from diffusion_core.terminal.wrapping import filled

LINES = "    \n    \n -- \n    \n    \n    \n    \n    \n"
"""The lines of a rich box: only one of dashes below the head."""

GAP = 2
"""Characters between two columns."""

NOTHING = "-"
"""The cell of a missing value."""

WIDEST = 10_000
"""Characters of a line where no terminal limits it."""


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False, keys: int = 1) -> str:
    """Return a table for stdout.

    In a terminal, the table fits the width. If it is too wide, names of columns are shortened to their last part where
    that is unique, columns with one and the same cell go below the table, in a line, and what is still too wide is
    printed as several tables below each other, each with the first columns. The head is bold unless NO_COLOR is set. In
    a file or a pipe it is plain text with one line a row, and the whole names.

    Args:
        columns: the head.
        rows: cells, as many as there are columns.
        right: align all columns but the first to the right.
        keys: number of columns, the first ones, that say what a row is.
    """
    if not sys.stdout.isatty():
        return _drawn(columns, rows, WIDEST, right)
    width = shutil.get_terminal_size().columns
    if _width(columns, rows, range(len(columns))) <= width:
        return _drawn(columns, rows, width, right)
    heads, same = short_names(columns), []
    if len(rows) > 1:
        same = [i for i in range(keys, len(columns)) if len({row[i] for row in rows}) == 1]
    shown = [i for i in range(len(columns)) if i not in same]
    tables = [
        _drawn([heads[i] for i in block], [[row[i] for i in block] for row in rows], width, right)
        for block in _blocks(heads, rows, shown, keys, width)
    ]
    alike = ", ".join(f"{columns[i]} = {rows[0][i]}" for i in same if rows[0][i] != NOTHING)
    if alike:
        tables.append("\n".join(filled(f"in all rows: {alike}", width, "")))
    return "\n\n".join(tables)


def short_names(names: Sequence[str]) -> list[str]:
    """Return the last part of each name, behind a dot or a slash, where no other name ends in it."""
    last = [re.split(r"[./]", name)[-1] for name in names]
    return [short if last.count(short) == 1 and short else name for name, short in zip(names, last, strict=True)]


def _width(heads: Sequence[str], rows: Sequence[Sequence[str]], places: Iterable[int]) -> int:
    """Return the width of a table of some of the columns."""
    return sum(GAP + max(len(cells[i]) for cells in (heads, *rows)) for i in places) - GAP


def _blocks(
    heads: Sequence[str], rows: Sequence[Sequence[str]], places: Sequence[int], keys: int, width: int
) -> list[list[int]]:
    """Share columns among tables that fit, each with the first ones. One that is too wide alone gets its own table."""
    first = list(places[:keys])
    blocks = [list(first)]
    for place in places[keys:]:
        if len(blocks[-1]) > keys and _width(heads, rows, [*blocks[-1], place]) > width:
            blocks.append(list(first))
        blocks[-1].append(place)
    return blocks


def _drawn(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, right: bool) -> str:
    from rich.box import Box  # rich is slow to import, and most commands print no table.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styled = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    table = Table(
        box=Box(LINES, ascii=True), show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    for index, column in enumerate(columns):
        table.add_column(Text(column), overflow="fold", justify="right" if right and index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(
        file=io.StringIO(), width=width, color_system="standard" if styled else None, force_terminal=styled
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
        return NOTHING
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def mean_and_range(values: Sequence[float], form: str) -> str:
    """Return such as ``0.98 (0.97 to 0.99)``, or the value alone if there is only one."""
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):{form}}{spread}"
