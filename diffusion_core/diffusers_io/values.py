"""Read Diffusers' configurations, and check single values."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion_core.config import ConfigError


@contextmanager
def errors_of(file: Path) -> Iterator[None]:
    """Put the name of a file before the message of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{str(file)!r}: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(file)!r}: cannot be read as a JSON object")
    return content


def defaults(*classes: type) -> dict[str, Any]:
    """Return the arguments of Diffusers' classes and the values that they take where a configuration omits them."""
    parameters = [parameter for kind in classes for parameter in inspect.signature(kind).parameters.values()]
    return {parameter.name: parameter.default for parameter in parameters}


def problem(given: Mapping[str, Any], key: str, expected: str) -> str:
    """Return the message about the value of a key."""
    return f"{key} = {given.get(key)!r}: expected {expected}"


def fixed_problems(given: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    """Yield a message for each key whose value is not one of those allowed."""
    for key, values in allowed.items():
        if key in given and given[key] not in values:
            yield problem(given, key, " or ".join(map(repr, values)))


def is_list(value: Any) -> bool:
    """Return whether a value is a list or a tuple."""
    return isinstance(value, list | tuple)


def is_count(value: Any) -> bool:
    """Return whether a value is an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """Return whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
