"""Registries: what a user can choose by name, each name with one record that says all that the code asks of it.

A record is added where its function stands::

    SAMPLERS["mine"] = Sampler(mine, "what it does (source)")

A knob that names one takes its allowed values and its help from the registry (:class:`Choice`). A user's own module
adds records without a change here; the knob ``plugins`` names it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol, TypeVar

from pydantic_core import PydanticCustomError, core_schema


class Record(Protocol):
    """What every record has.

    Attributes:
        help: one line for the help of the knob: what it does, and its source.
    """

    @property
    def help(self) -> str:
        """Return one line for the help of the knob."""


R = TypeVar("R", bound=Record)


class Registry(MutableMapping[str, R]):
    """Records by name, in the order in which they were added.

    Args:
        knob: the dotted key of the knob that chooses among them.
        modules: those that add the built-in records; imported at the first look-up, since they are slow to import.
    """

    def __init__(self, knob: str, *modules: str) -> None:
        self.knob = knob
        self._modules = list(modules)
        self._records: dict[str, R] = {}

    def _load(self) -> dict[str, R]:
        while self._modules:
            importlib.import_module(self._modules.pop(0))
        return self._records

    def __setitem__(self, name: str, record: R) -> None:
        if name in self._records:
            raise ValueError(f"{self.knob} = {name!r}: registered already; choose another name")
        self._records[name] = record

    def __getitem__(self, name: str) -> R:
        try:
            return self._load()[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._records, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise KeyError(f"{self.knob} = {name!r}: expected one of {', '.join(self._records)}{hint}") from None

    def __delitem__(self, name: str) -> None:
        del self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


class Choice:
    """A knob's annotation: its value is a key of a mapping. ``sampler: Annotated[str, Choice(SAMPLERS)] = "ddim"``.

    Args:
        names: a registry, or any mapping with texts as keys.
        others: further values that stand for no record, with their help.
    """

    def __init__(self, names: Mapping[str, Any], others: Mapping[str, str] | None = None) -> None:
        self.names = names
        self.others = dict(others or {})

    def values(self) -> list[str]:
        """All values that the knob accepts."""
        return [*self.others, *self.names]

    def explained(self) -> str:
        """The values and what each does, in one line; empty where the mapping holds no records."""
        helps = dict(self.others)
        helps |= {name: record.help for name, record in self.names.items() if hasattr(record, "help")}
        return "; ".join(f"{name}: {text}" for name, text in helps.items())

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value in self.others or value in self.names:
            return value
        raise PydanticCustomError("choice", "expected one of {values}", {"values": ", ".join(self.values())})
