"""Read and check single values of Diffusers' configurations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any


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
