"""Run the commands in this process, as their users type them."""

from __future__ import annotations

import importlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
MODULES = ("agent", "agent.sweep", "agent.sync", "agent.clean", "agent.leaderboard")
COMMANDS = (*MODULES, *sorted(path.stem for path in SCRIPTS.glob("*.py")))
"""Every command: a module of ``python -m``, or a script."""


def run_command(name: str, *words: str) -> int:
    """Run a command. Return its exit status."""
    if name == "train_cifar":  # Its words go to the agent.
        from train_cifar import USAGE

        from agent.__main__ import main

        return main(words, usage=USAGE, defaults=["--preset=cifar10"])
    module = importlib.import_module(f"{name}.__main__" if name in ("agent", "agent.sweep") else name)
    try:
        status = module.main(list(words))
    except SystemExit as leaving:
        status = leaving.code
    assert isinstance(status, int | None)
    return status or 0


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, with the content of the files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
