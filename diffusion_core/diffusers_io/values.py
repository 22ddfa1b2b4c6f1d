"""Checks of single values in Diffusers' configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def fixed_problems(given: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    """Report the keys whose value is none of those allowed. A missing key is fine."""
    for key, values in allowed.items():
        if key in given and given[key] not in values:
            yield f"{key} = {given[key]!r}: expected {' or '.join(map(repr, values))}"


def is_list(value: Any) -> bool:
    """Whether a value is a list or a tuple."""
    return isinstance(value, list | tuple)


def is_count(value: Any) -> bool:
    """Whether a value is an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def unknown_keys(config: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The keys of a Diffusers configuration that its class does not know, and passes over."""
    return [key for key in config if key not in known and not key.startswith("_")]
