"""The macros of a sweep's command, such as ``${args}``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

MAX_SHOWN = 300
"""Characters of a value in a message."""

ARGS_MACRO = "${args}"
MACROS = ("${env}", "${interpreter}", "${program}", ARGS_MACRO)
"""The macros of a command besides ``${envvar:NAME}``."""

ENVIRONMENT_MACRO = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


def expand_command(command: Iterable[Any], arguments: Sequence[str], program: str | None = None) -> list[str]:
    """Fill in the macros of a sweep's command as ``wandb agent`` does."""
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [program] if program else [],
        ARGS_MACRO: arguments,
    }
    words: list[str] = []
    for word in map(str, command):
        word = ENVIRONMENT_MACRO.sub(lambda match: os.environ.get(match[1], match[1]), word)
        words += macros.get(word, [word])
    return words


def shortened(value: Any) -> str:
    """Return a value for a message, cut to :data:`MAX_SHOWN` characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def command_problems(command: Any) -> list[str]:
    """Return what is wrong with a sweep's command."""
    if not isinstance(command, list) or ARGS_MACRO not in command:
        return [
            f"command = {shortened(command)}: expected a list that ends in {ARGS_MACRO}, such as "
            "[${env}, ${interpreter}, -m, agent, ${args}]"
        ]
    return [
        f"command = {word!r}: expected one of {', '.join(MACROS)}, ${{envvar:NAME}}"
        for word in command
        if "${" in ENVIRONMENT_MACRO.sub("", str(word)) and word not in MACROS
    ]
