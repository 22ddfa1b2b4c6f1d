"""Describe knobs: list them, say what each accepts and does, and write the help text."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffusion_core.registry import Choice
from diffusion_core.terminal.wrapping import filled, width_of_terminal


def list_knobs(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every knob of a schema: dotted key and field, in order."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from list_knobs(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def explained(field: FieldInfo) -> str:
    """What a knob does, in one line; of a choice also what each of its values does."""
    purpose = " ".join((field.description or "").split())
    elements = [typing.get_args(part)[1:] for part in typing.get_args(field.annotation)]  # Of a list's annotation.
    metadata = [*field.metadata, *(extra for element in elements for extra in element)]
    choices = [choice.explained() for choice in metadata if isinstance(choice, Choice)]
    return " ".join(part for part in (purpose, *(f"{text}." for text in choices if text)) if part)


def allowed(field: FieldInfo) -> str:
    """What a knob accepts, in words: ``a number > 0 and <= 1, or None``."""
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *extra = typing.get_args(annotation)
        flat_extra = [m for e in extra for m in (e.metadata if isinstance(e, FieldInfo) else [e])]
        return _allowed(inner, [*metadata, *flat_extra])
    if origin in (typing.Union, types.UnionType):
        parts = sorted(typing.get_args(annotation), key=lambda part: part is type(None))
        return " or ".join(_allowed(part, metadata) for part in parts)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(value) for value in typing.get_args(annotation))
    if origin is list:
        lengths = [
            f"{words} {getattr(constraint, name)}"
            for constraint in metadata
            for name, words in (("min_length", "at least"), ("max_length", "at most"))
            if getattr(constraint, name, None) is not None
        ]
        length = f" of {' and '.join(lengths)}" if lengths else ""
        return f"a list{length} such as 1,2,2, each {_allowed(typing.get_args(annotation)[0])}"
    if annotation is str and any(getattr(constraint, "min_length", None) for constraint in metadata):
        return "text that is not empty"
    for choice in metadata:
        if isinstance(choice, Choice):
            return "one of " + ", ".join(choice.values())
    bounds = [
        f"{sign} {f'{bound:g}' if isinstance(bound, float) else bound}"
        for constraint in metadata
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if (bound := getattr(constraint, name, None)) is not None
    ]
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "None"}
    return " ".join([names.get(annotation, str(annotation)), " and ".join(bounds)]).strip()


def help_text(schema: type[BaseModel], topic: str = "") -> str:
    """Return knobs with what they accept, their default and their purpose, a paragraph a section.

    Args:
        schema: the knobs.
        topic: a section or a knob to be limited to; empty: all of them.
    """
    lines: list[str] = []
    section = None
    for key, field in list_knobs(schema):
        if topic and key != topic and not key.startswith(f"{topic}."):
            continue
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines.append("")
        default = ",".join(map(str, field.default)) if isinstance(field.default, list) else field.default
        lines.append(f"  --{key}={default}")
        lines += filled(f"{explained(field)} [{allowed(field)}]", width_of_terminal(), " " * 8)
    return "\n".join(lines)
