"""Command lines of the comparisons: common options, lists of numbers and names, errors in one line."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from agent.command import fail
from diffusion_core.config import ConfigError
from diffusion_core.data.datasets import DataError
from diffusion_core.messages import Parser, out_folder
from diffusion_core.training.stopping import Stopped

T = TypeVar("T", int, float)


def parser_of(description: str | None, out: str, usage: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with the option ``--out``, the folder of all results."""
    parser = Parser(description=description, usage=usage)
    where = f"folder of all results ({out})"
    parser.add_argument("--out", type=out_folder, default=Path(out), metavar="DIR", help=where)
    return parser


def numbers(key: str, text: str, kind: Callable[[str], T], accepts: Callable[[T], bool], expected: str) -> list[T]:
    """Return the numbers between the commas of an option.

    Raises:
        ConfigError: if one is not a number, or is not accepted.
    """
    try:
        found = [kind(word) for word in text.split(",")]
        if all(map(accepts, found)):
            return found
    except ValueError:
        pass
    raise ConfigError(f"{key} = {text!r}: expected {expected}")


def at_least(key: str, value: int, least: int) -> int:
    """Return the value of an option.

    Raises:
        ConfigError: if it is smaller than ``least``.
    """
    if value < least:
        raise ConfigError(f"{key} = {value}: expected an integer >= {least}")
    return value


def some_of(key: str, text: str | None, choices: Sequence[str], separator: str = ";") -> list[str]:
    """Return the names that an option selects, in its order; all of them without the option, or for ``all``.

    Raises:
        ConfigError: if a name is not one of the choices.
    """
    names = list(choices) if text in (None, "all") else [word.strip() for word in str(text).split(separator)]
    for name in names:
        if name not in choices:
            raise ConfigError(f"{key} = {name!r}: expected some of {f'{separator} '.join(choices)}")
    return names


def status_of(work: Callable[[], int], out: Path) -> int:
    """Run the command and return its exit status; report unusable input and Ctrl-C in one line."""
    try:
        return work()
    except (ConfigError, DataError) as error:
        return fail(str(error))
    except Stopped as stopped:
        code = stopped.signal_code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    print(f"stopped; run the same command again to continue ({out})", file=sys.stderr)
    return code
