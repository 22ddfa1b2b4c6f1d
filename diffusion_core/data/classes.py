"""Names of classes: their order, which decides the labels, and how they are compared and shown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal

from diffusion_core.messages import listed, printable
from diffusion_core.redact import redacted

NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)
SHOWN = 20
"""Names in a message; of more classes, the first ones."""


def normal(name: str) -> str:
    """Return a name in the Unicode form that names are compared in (NFC); systems store either form."""
    return unicodedata.normalize("NFC", name)


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort the names of classes: by value if all are numbers, else as text."""
    known = list(names)
    if are_numbers(known):
        return tuple(sorted(known, key=lambda name: (Decimal(name), name)))
    return tuple(sorted(known))


def are_numbers(names: Iterable[str]) -> bool:
    """Return whether all names are decimal numbers."""
    return all(map(NUMBER.fullmatch, names))


def shown_classes(class_names: Sequence[str]) -> str:
    """Return the number and the names of classes, of many the first ones."""
    word = "class" if len(class_names) == 1 else "classes"
    return f"{len(class_names):,} {word}: {listed(map(printable, class_names), SHOWN)}"


def same_classes(names: Sequence[str], recorded: Sequence[str]) -> bool:
    """Return whether names are those that a checkpoint records, in any order and Unicode form."""
    return sorted(map(_recorded, names)) == sorted(map(_recorded, recorded))


def in_order(names: Sequence[str], recorded: Sequence[str]) -> tuple[str, ...]:
    """Return names in the order that a checkpoint records; unchanged if it records other classes."""
    place = {_recorded(name): label for label, name in enumerate(recorded)}
    if len(place) != len(names) or not same_classes(names, recorded):
        return tuple(names)
    return tuple(sorted(names, key=lambda name: place[_recorded(name)]))


def _recorded(name: str) -> str:
    return normal(str(redacted(name)))
