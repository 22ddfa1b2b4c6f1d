"""Registries of the options that a user selects by name.

Each name has one record, which holds everything that the code needs to know about the option. Register a record next
to the function that it describes::

    SAMPLERS["mine"] = SamplerRecord(mine, "what it does (source)")

A knob annotated with :class:`Choice` takes its allowed values and its help from the registry. Modules of users can
register records too; the knob ``plugins`` names these modules.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol, TypeVar

from pydantic_core import PydanticCustomError, core_schema


class Record(Protocol):
    """Protocol of all records.

    Attributes:
        help: one line for the help of the knob: what it does, and its source.
    """

    @property
    def help(self) -> str:
        """Return one line for the help of the knob."""


R = TypeVar("R", bound=Record)


class Registry(MutableMapping[str, R]):
    """Records by name, in the order in which they were registered.

    Args:
        knob: dotted key of the knob that selects one of them.
        modules: modules that register the built-in records. They are slow to import, so the first look-up imports them.
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
    """Annotation of a knob whose value is a key of a mapping: ``sampler: Annotated[str, Choice(SAMPLERS)] = "ddim"``.

    Args:
        names: a registry, or any mapping with strings as keys.
        others: additional values without a record, with their help.
    """

    def __init__(self, names: Mapping[str, Any], others: Mapping[str, str] | None = None) -> None:
        self.names = names
        self.others = dict(others or {})

    def values(self) -> list[str]:
        """Return all values that the knob accepts."""
        return [*self.others, *self.names]

    def explained(self) -> str:
        """Return the values with their help, in one line. Values without help are omitted."""
        helps = dict(self.others)
        helps |= {name: record.help for name, record in self.names.items() if hasattr(record, "help")}
        return "; ".join(f"{name}: {text}" for name, text in helps.items())

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value in self.others or value in self.names:
            return value
        raise PydanticCustomError("choice", "expected one of {values}", {"values": ", ".join(self.values())})
