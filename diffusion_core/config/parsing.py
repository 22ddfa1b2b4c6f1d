"""Reading configurations: the command line, YAML files and what ``wandb agent`` passes, into one typed schema.

Values pass through a flat dictionary of dotted keys. Whatever is wrong becomes a :class:`ConfigError` of one line that
names the key, the value and what is allowed.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from diffusion_core.config.description import allowed, list_knobs
from diffusion_core.messages import UserError, one_line, suggested
from diffusion_core.redact import redacted

Schema = TypeVar("Schema", bound=BaseModel)

COMMAND_FLAGS = ("--config", "--dry-run", "--print-config", "--help", "--version")
"""Words that every command with knobs understands besides them."""

FOREIGN_KEYS = frozenset({"_wandb", "wandb_version"})
"""Keys that W&B adds to the configuration of a run, and hands back when it resumes one."""

MAX_YAML_BYTES = 1_000_000
MAX_YAML_VALUES = 100_000

NONE_WORDS = frozenset({"None", "none", "null", "Null", "NULL", "~"})

BARE_WORD = re.compile(r"\+{0,2}([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
"""A key and its value without hyphens: the spellings of ``wandb agent`` for Hydra."""

REFUSED = object()
"""Stands for a value that pydantic would take although it is of another kind (true for a number)."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message is one line meant for the user.

    Attributes:
        problems: what is wrong, each with key, value and what is allowed; together they are the message.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def flatten(config: BaseModel) -> dict[str, Any]:
    """A configuration as a flat dictionary of dotted keys and plain values."""
    return flatten_mapping(config.model_dump(mode="json"))


def flatten_mapping(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping by dotted key, each key with a prefix."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten_mapping(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def build(schema: type[Schema], *layers: Mapping[str, Any]) -> Schema:
    """Build a configuration from layers of values, later ones over earlier ones.

    Args:
        schema: the model to build.
        layers: keys dotted or nested, values typed or as text.

    Raises:
        ConfigError: on unknown keys, wrong types and values out of range, or else on a combination that cannot work.
    """
    fields = dict(list_knobs(schema))
    values: dict[str, Any] = {}
    for layer in layers:
        values |= _dotted(layer, schema)
    problems = [unknown_key(key, value, fields) for key, value in values.items() if key not in fields]
    known = {key: value for key, value in values.items() if key in fields}
    try:
        config = schema.model_validate(_nest({key: _parse(value, fields[key]) for key, value in known.items()}))
    except ValidationError as error:
        combination = any(problem["type"] == "value_error" for problem in error.errors())
        if not (problems and combination):  # An unknown key may be what it lacks.
            problems += _messages(error, fields, known)
    if problems:
        raise ConfigError(*problems)
    return config


def unknown_key(key: str, value: Any, known: typing.Iterable[str]) -> str:
    """The message for a key that is in no schema, with the nearest one that is."""
    known = list(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not nearest:
        nearest = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    flag = suggested(f"--{key}", COMMAND_FLAGS) if value == "true" else ""  # As a word without a value is read.
    hint = flag or (f"did you mean {nearest[0]}?" if nearest else "--help all lists all keys")
    shown = key if key.isprintable() else repr(key)
    return f"{shown} = {value!r}: unknown key; {hint}"


def _dotted(layer: Mapping[str, Any], schema: type[BaseModel]) -> dict[str, Any]:
    """Flatten nested sections, also one that arrives as text (``wandb agent`` passes a nested parameter's repr)."""
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        if not isinstance(key, str):
            raise ConfigError(f"{key!r}: expected a name such as train.lr")
        if key.split(".")[0] in FOREIGN_KEYS:
            continue
        section = schema.model_fields.get(key)
        if section is not None and isinstance(section.annotation, type) and issubclass(section.annotation, BaseModel):
            if isinstance(value, str):
                with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                    value = ast.literal_eval(value)
            if not isinstance(value, Mapping):
                others = [known for known, _ in list_knobs(schema) if known.rpartition(".")[2] == key]
                hint = f", or did you mean {others[0]}?" if others else ""
                raise ConfigError(
                    f"{key} = {value!r}: {key} is a section; set one of its keys, such as "
                    f"{key}.{next(iter(section.annotation.model_fields))}{hint}"
                )
            flat.update(flatten_mapping(value, f"{key}."))
        else:
            flat[key] = value
    return flat


def _parse(value: Any, field: FieldInfo) -> Any:
    """Turn text into what pydantic reads: None where the knob may be None, lists from their usual spellings."""
    kinds = _kinds(field)
    if isinstance(value, str):
        text = value.strip()
        if type(None) in kinds and text in NONE_WORDS:
            return None
        if list in kinds:
            return _parse_list(text)
        number = as_number(text, field)
        return number if str not in kinds or isinstance(number, int | float) else value
    if isinstance(value, bool) and bool not in kinds:
        return REFUSED
    if list in kinds and isinstance(value, list | tuple):
        return [REFUSED if isinstance(entry, bool) else entry for entry in value]
    return [value] if list in kinds and isinstance(value, int | float) else value


def as_number(value: Any, field: FieldInfo) -> Any:
    """A number that was given as text, such as 1e-5, which YAML takes for text, if the knob is one; else the value."""
    kinds = _kinds(field)
    if isinstance(value, str) and kinds & {int, float}:
        with contextlib.suppress(ValueError):
            whole = int(value)
            return whole if str not in kinds else value  # Beside words such as auto, digits are read as they are.
        with contextlib.suppress(ValueError):
            number = float(value)
            return int(number) if number.is_integer() and float not in kinds else number
    return value


def is_fraction(field: FieldInfo) -> bool:
    """Whether a knob takes numbers between two whole ones."""
    return float in _kinds(field)


def _parse_list(text: str) -> Any:
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        literal = ast.literal_eval(text)  # Texts in quotes, as Python spells a list of them.
        if isinstance(literal, list | tuple) and literal and all(isinstance(entry, str) for entry in literal):
            return list(literal)
    bare = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
    return [part.strip() for part in bare.strip().rstrip(",").split(",")] if bare.strip() else []


def _kinds(field: FieldInfo) -> set[Any]:
    """The plain types that a knob accepts: ``{float, NoneType}`` for ``float | None``; Literals count as str."""

    def walk(annotation: Any) -> Iterator[Any]:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            yield from walk(typing.get_args(annotation)[0])
        elif origin in (typing.Union, types.UnionType):
            for part in typing.get_args(annotation):
                yield from walk(part)
        elif origin is typing.Literal:
            yield str
        else:
            yield origin or annotation

    return set(walk(field.annotation))


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    return nested


def _messages(error: ValidationError, fields: Mapping[str, FieldInfo], values: Mapping[str, Any]) -> list[str]:
    messages: list[str] = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        while key and key not in fields:  # An element of a list, or a branch of a union: name the knob itself.
            key = key.rpartition(".")[0]
        if key in fields and problem["type"] != "value_error":
            message = f"{key} = {values.get(key)!r}: expected {allowed(fields[key])}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
        if message not in messages:
            messages.append(message)
    return messages


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML readers otherwise take the last in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """The values in a YAML file, keys dotted or nested.

    Raises:
        ConfigError: if the file cannot be read, is no YAML, or holds no mapping.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_YAML_BYTES + 1)
        if len(text) > MAX_YAML_BYTES:
            raise ConfigError(f"--config = {str(path)!r}: larger than {MAX_YAML_BYTES:,} bytes")
        content = yaml.load(text.decode("utf-8"), _StrictLoader)
        if not _is_bounded(content):
            raise ConfigError(f"--config = {str(path)!r}: holds more than {MAX_YAML_VALUES:,} values, or itself")
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"--config = {str(path)!r}: nested too deeply") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"--config = {str(path)!r}: {reason}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01.
        raise ConfigError(f"--config = {str(path)!r}: not valid YAML: {one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config = {str(path)!r}: expected a mapping of keys to values")
    return content


def _is_bounded(content: Any) -> bool:
    """Whether a tree of containers ends: aliases make a short text a tree without end, or nearly so."""
    left, seen = [content], 0
    while left and seen <= MAX_YAML_VALUES:
        value = left.pop()
        seen += 1
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value
    return seen <= MAX_YAML_VALUES


def to_yaml(config: BaseModel, *, without_secrets: bool = False, beyond: BaseModel | None = None) -> str:
    """The configuration as YAML with dotted keys: a valid ``--config`` file.

    Args:
        config: every knob.
        without_secrets: whether to remove what looks like a key or a password.
        beyond: leave out the knobs that have the values of this configuration, except its ``preset``.
    """
    values = redacted(flatten(config)) if without_secrets else flatten(config)
    if beyond is not None:
        same = flatten(beyond).items()
        values = {key: value for key, value in values.items() if key == "preset" or (key, value) not in same}
    flow = None if any(isinstance(value, list) for value in values.values()) else False  # Lists alone in one line.
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=flow)


def split_argv(argv: list[str]) -> dict[str, Any]:
    """Command-line words as a dictionary. A key that is given again counts where it is given last.

    Keys come as ``--key=value``, ``--key value``, and ``--key`` alone for true, or in the other forms that ``wandb
    agent`` can be told to use: ``key=value``, ``+key=value``, ``++key=value``, and a JSON object, whose values keep
    their types. ``--config`` adds up to a list of files.

    Raises:
        ConfigError: on a word that is none of these.
    """
    values: dict[str, Any] = {}

    def give(key: str, value: Any) -> None:
        before = values.pop(key, [])  # The order of the keys decides between train.lr and a whole section train.
        values[key] = [*before, value] if key == "config" else value

    words = iter(range(len(argv)))
    for i in words:
        word = argv[i]
        if word.startswith("{"):
            for key, value in _json_object(word).items():
                give(key, value)
        elif bare := BARE_WORD.fullmatch(word):
            give(*bare.groups())
        elif not word.startswith("--") or word == "--":
            raise ConfigError(f"{word!r}: expected --key=value; --help all lists all keys")
        else:
            key, equals, text = word[2:].partition("=")
            if not equals:
                has_value = i + 1 < len(argv) and not argv[i + 1].startswith("--")
                text = argv[next(words)] if has_value else "true"
            give(key, text)
    return values


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{one_line(text)!r}: not valid JSON: {one_line(error)}") from None
    return content
