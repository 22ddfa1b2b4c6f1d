"""Tables: plain where stdout is no terminal, fitted to the width where it is one."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from diffusion_core.tables import cell, markdown_table, text_table

ROWS = [["1", "house-001 [bold]", "a text that wraps in a narrow terminal"], ["12", "-", "ärgerlich"]]


def test_a_table_without_a_terminal_is_plain_text_with_one_line_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert text_table(["", "trial", "note"], ROWS).splitlines() == [
        "    trial             note",
        "-" * 60,
        "1   house-001 [bold]  a text that wraps in a narrow terminal",
        "12  -                 ärgerlich",
    ]
    assert text_table(["a", "b"], [["x", "1"], ["y", "100"]], right=True).splitlines()[2:] == ["x    1", "y  100"]


@pytest.mark.parametrize("no_color", [False, True])
def test_a_table_fits_the_terminal(no_color: bool) -> None:
    script = f"from diffusion_core.tables import text_table; print(text_table(['', 'trial', 'note'], {ROWS!r}))"
    environment = os.environ | {"COLUMNS": "40", "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=slave, env=environment | ({"NO_COLOR": "1"} if no_color else {})
    )
    assert process.wait(60) == 0
    os.close(slave)
    text = os.read(master, 10_000).decode()
    os.close(master)
    assert ("\x1b[" in text) is not no_color
    lines = text.splitlines()
    assert len(lines) > 4
    if no_color:
        assert max(map(len, lines)) <= 40
        assert " ".join("".join(line[22:].ljust(19) for line in lines).split()).count("narrow") == 1


def test_a_markdown_table_escapes_bars() -> None:
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == ["| a | b |", "|---|---|", "| x\\|y | 1 |"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.00042134, "0.0004213"), (1234567, "1,234,567"), (True, "True"), ("x", "x")]
)
def test_cells(value: object, text: str) -> None:
    assert cell(value) == text
