"""What the project has one function for is not written again elsewhere. Read from the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("agent", "diffusion_core", "pruning", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

ONE_OF_EACH = {
    "write files atomically: files.replaced_file": (r"^os\.(replace|rename|fsync)$", "diffusion_core/files.py"),
    "hash: files.sha256": (r"^hashlib\.(sha|md|new|file_digest)", "diffusion_core/files.py"),
    "handle signals: signals.signal_handler": (r"^signal\.signal$", "diffusion_core/signals.py"),
    "write CSV: files.write_csv": (r"^csv\.", "diffusion_core/files.py"),
    "print tables: tables.text_table": (r"^(rich\..*|Console|Table)$", "diffusion_core/tables.py"),
}
"""What is done once: a pattern of the calls that do it, and the one module that may call them."""

ONE_TEXT = {
    "errors in one line: messages.one_line": (r"\.join\(\s*str\(error\)", "diffusion_core/messages.py"),
    "temporary names: files.replaced_file": (r"\.partial\"", "diffusion_core/files.py"),
    "write text: files.write_text": (r"\.write_text\(", "diffusion_core/files.py"),
    "git's description of the code: summary.commit": (r"\"git\",", "diffusion_core/training/summary.py"),
    "labels in turn: generation.round_robin": (r"Request\([^()]*%", "diffusion_core/sampling/generation.py"),
    "Markdown tables: tables.markdown_table": (r"\"\| |\|---", "diffusion_core/tables.py"),
    "mean and range: tables.mean_and_range": (r" to \{.*max\(", "diffusion_core/tables.py"),
}
"""The same, as patterns of the text of a line."""

ALLOWED = {
    ("git's description of the code: summary.commit", "diffusion_core/redact.py"): "asks for the remote",
    ("write text: files.write_text", "diffusion_core/diffusers_io/exporter.py"): "inside files.replaced_folder",
    ("temporary names: files.replaced_file", "diffusion_core/checkpoint.py"): "deletes unfinished checkpoints",
    ("temporary names: files.replaced_file", "diffusion_core/data/preparation/target.py"): "ignores unfinished files",
}


def calls(source: str) -> set[str]:
    """Return the dotted names of all functions that a module calls."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_one_module_calls(what: str) -> None:
    pattern, home = ONE_OF_EACH[what]
    found = {name for name, source in FILES.items() if any(re.search(pattern, call) for call in calls(source))}
    assert found == {home}, f"{what} is in {home}"


@pytest.mark.parametrize("what", ONE_TEXT)
def test_one_module_writes(what: str) -> None:
    pattern, home = ONE_TEXT[what]
    found = {name for name, source in FILES.items() if any(re.search(pattern, line) for line in source.splitlines())}
    allowed = {name for entry, name in ALLOWED if entry == what}
    assert found - allowed == {home}, f"{what} is in {home}"
    assert allowed <= found, "an entry of ALLOWED is out of date"
