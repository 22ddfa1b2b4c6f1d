"""Fit texts to the width of the terminal: paragraphs, indented examples, and commands."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator
from itertools import groupby

WIDEST = 100
"""Most characters of a line of help, however wide the terminal is."""
NARROWEST = 40
GAP = re.compile(r"(\s*\S.*?)\s{2,}(\S.*)")
"""An indented line of two columns, such as a command and what it does."""


def width_of_terminal() -> int:
    """Return the characters of a line of help: those of the terminal (COLUMNS), 80 without one."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))


def wrapped(text: str, width: int | None = None) -> str:
    """Return a text with no line longer than ``width``, if its words allow that.

    Lines that begin without a space are filled as paragraphs. Indented lines stay as they are if they fit. A longer one
    is a command, and then perhaps what it does after two spaces: the command goes on behind a backslash.

    Args:
        text: lines of any length.
        width: in characters; None: :func:`width_of_terminal`.
    """
    width = width or width_of_terminal()
    lines: list[str] = []
    for kind, group in groupby(text.splitlines(), key=_kind):
        if kind == "text":
            lines += textwrap.wrap(" ".join(group), width, break_long_words=False, break_on_hyphens=False)
        elif kind == "indented":
            lines += [part for line in group for part in _indented(line, width)]
        else:
            lines += [""] * len(list(group))
    return "\n".join(lines)


def _kind(line: str) -> str:
    if not line.strip():
        return "empty"
    return "indented" if line[0].isspace() else "text"


def _indented(line: str, width: int) -> Iterator[str]:
    line = line.rstrip()
    indent = line[: len(line) - len(line.lstrip())]
    columns = GAP.fullmatch(line)
    if len(line) <= width:
        yield line
    elif columns is not None:
        yield from _indented(columns[1], width)
        yield from filled(columns[2], width, f"{indent[: width // 4]}      ")
    elif len(indent) > width // 3:  # It goes on with the second column of the line above.
        yield from filled(line.strip(), width, " " * 8)
    elif re.match(r"\s*(python|accelerate|pip|wandb|usage:)", line):
        yield from filled(line.strip(), width, f"{indent}    ", first=indent, end=" \\")
    else:
        yield from filled(line.strip(), width, indent)


def filled(text: str, width: int, indent: str, *, first: str | None = None, end: str = "") -> list[str]:
    """Return the lines of a paragraph.

    Args:
        text: its words.
        width: in characters.
        indent: of its lines.
        first: indent of the first line; None: the same.
        end: what ends all lines but the last.
    """
    lines = textwrap.wrap(
        text,
        width - len(end),
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line + end for line in lines[:-1]] + lines[-1:]
