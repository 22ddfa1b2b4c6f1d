"""What ``--help`` prints of a command that takes knobs: a page, the knobs of a section, or everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from diffusion_core.config.description import help_text, list_knobs
from diffusion_core.config.parsing import ConfigError
from diffusion_core.config.presets import PRESET_HELP
from diffusion_core.messages import VERSION, suggested
from diffusion_core.terminal.wrapping import filled, width_of_terminal, wrapped

EVERYTHING = "all"
USUAL = (
    "data.name",
    "data.path",
    "train.steps",
    "train.batch_size",
    "train.lr",
    "train.device",
    "prune.method",
    "prune.keep",
    "eval.figures",
    "log.dir",
    "seed",
    "plugins",
)
"""Knobs that the first page of help lists."""

OPTIONS = {
    "--config FILE.yaml": "read values from a file (keys dotted or nested; several files: in order); the command line "
    "overrides them",
    "--dry-run": "check everything that a run checks before it starts, print the size and cost of the model, and stop",
    "--print-config": "print all values as YAML, which --config reads, and stop",
    "--help [SECTION]": "print this page, the knobs of a section (--help prune), one knob (--help train.lr), or all "
    "(--help all)",
    "--version": "print the version",
}
"""Words of a command that are no knobs, and what they do."""

FLAGS = tuple(option.split()[0] for option in OPTIONS)


NAMED_BY = {
    "preset": "--preset=digits (built in, half a minute), --preset=cifar10 (downloaded), --data.name=NAME or --config "
    "FILE.yaml",
    "data.name": "--data.name=digits (built in), or another NAME, some of which are downloaded",
}
"""What a command may be told to train on, by the key that its message names."""


def check_data_named(values: Mapping[str, Any], key: str = "preset") -> None:
    """Check that a command line says what to train on, so that a bare command downloads nothing.

    Args:
        values: words of the command line.
        key: ``preset``, or ``data.name`` for a command that takes only the knobs of ``data.*``.

    Raises:
        ConfigError: if it does not.
    """
    if not {"preset", "data", "data.name", "config"} & values.keys():
        raise ConfigError(f"--{key}: no data set is named; give {NAMED_BY[key]}; --help explains them")


def answer(words: Sequence[str], usage: str, schema: type[BaseModel]) -> str | None:
    """Return what a command prints instead of its work: its help or its version. None if neither is asked for.

    Args:
        words: the command line.
        usage: the head of the help: how the command is called, and examples.
        schema: the knobs.

    Raises:
        ConfigError: if the help of an unknown section is asked for.
    """
    if "--version" in words:
        return VERSION
    for index, word in enumerate(words):
        flag, _, topic = word.partition("=")
        if flag in ("--help", "-h"):
            follows = words[index + 1] if index + 1 < len(words) else ""
            return page(topic or ("" if follows.startswith("-") or "=" in follows else follows), usage, schema)
    return None


def page(topic: str, usage: str, schema: type[BaseModel]) -> str:
    """Return the help on a topic: empty for the first page, a section, a knob, or ``all``.

    Raises:
        ConfigError: if there is no such topic.
    """
    if topic == EVERYTHING:
        return f"{first_page(usage, schema)}\n\nall knobs, with default, purpose and [accepted values]:\n" + help_text(
            schema
        )
    if not topic:
        return first_page(usage, schema)
    topic = topic.removeprefix("--").removesuffix(".")
    text = help_text(schema, topic)
    if not text:
        known = [*sections(schema), *(key for key, _ in list_knobs(schema))]
        raise ConfigError(
            f"--help = {topic!r}: no such section or knob; {suggested(topic, known) or '--help lists the sections'}"
        )
    return text.strip("\n")


def first_page(usage: str, schema: type[BaseModel]) -> str:
    """Return the usual options, the presets and the list of the sections."""
    fields = dict(list_knobs(schema))
    usual = {f"--{key}": _first_sentence(fields[key].description or "") for key in USUAL if key in fields}
    return "\n\n".join(
        [
            wrapped(usage.strip()),
            _listed("options:", OPTIONS),
            _listed("presets (--preset=NAME; whatever else is set overrides it):", PRESET_HELP),
            _listed("usual knobs (--KNOB=VALUE):", usual),
            _listed("sections of knobs (--help SECTION):", sections(schema)),
        ]
    )


def sections(schema: type[BaseModel]) -> dict[str, str]:
    """Return the sections of a schema, and what the knobs of each are about."""
    found = {}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            about = (field.annotation.__doc__ or "").partition("\n\n")[0].partition(": ")[2]
            found[name] = " ".join(about.split()).rstrip(".").replace("``", "")
    return found


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".")


def _listed(head: str, items: Mapping[str, Any]) -> str:
    """Return a head, and below it names with their explanations beside them."""
    column = max(len(name) for name in items) + 4
    lines = wrapped(head).splitlines()
    for name, text in items.items():
        lines += filled(str(text), width_of_terminal(), " " * column, first=f"  {name}".ljust(column))
    return "\n".join(lines)
