"""The command of a sweep: its macros, such as ``${args}``, and what each trial reads from it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_core.config import ConfigError, read_yaml, split_argv
from diffusion_core.config.parsing import flatten_mapping
from diffusion_core.files import write_json
from diffusion_core.messages import shortened
from diffusion_core.redact import redacted

DEFAULT_COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]
"""What W&B's agent runs if a sweep names only a program."""

ENVIRONMENT_MACRO = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
JSON_FILE = "${args_json_file}"
NO_FALSE = "${args_no_boolean_flags}"
OURS = re.compile(r"agent|(.*/)?train_cifar\.py")
"""The programs that read knobs as ``python -m agent`` does. Of others, only the parameters are known."""


def spellings(parameters: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the words that ``wandb agent`` puts in place of each macro that passes parameters."""
    plain = [f"{key}={value}" for key, value in parameters.items()]
    return {
        "${args}": [f"--{word}" for word in plain],
        "${args_no_equals}": [word for key, value in parameters.items() for word in (f"--{key}", str(value))],
        NO_FALSE: [
            f"--{key}" if value is True else f"--{key}={value}"
            for key, value in parameters.items()
            if value is not False
        ],
        "${args_no_hyphens}": plain,
        "${args_append_hydra}": [f"+{word}" for word in plain],
        "${args_override_hydra}": [f"++{word}" for word in plain],
        "${args_json}": [json.dumps(dict(parameters))],
    }


PASSING = (*spellings({}), JSON_FILE)
"""The macros that pass parameters."""
HYPHENATED = PASSING[:3]
"""Those of them whose words begin with hyphens, as no value does."""
MACROS = ("${env}", "${interpreter}", "${program}", *PASSING)


def expand_command(
    command: Sequence[Any] | None,
    parameters: Mapping[str, Any],
    program: str | None,
    json_file: Path,
    *,
    write: bool = True,
) -> list[str]:
    """Fill in the macros of a sweep's command as ``wandb agent`` does.

    If the command names the JSON file, it is written, unless ``write`` is false.
    """
    words = _filled_words(command)
    if write and JSON_FILE in words:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, dict(parameters))
    macros = spellings(parameters) | {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [program or ""],
        JSON_FILE: [str(json_file)],
    }
    return [filled for word in words for filled in macros.get(word, [word])]


def _filled_words(command: Sequence[Any] | None) -> list[str]:
    def variable(match: re.Match[str]) -> str:
        return os.environ.get(match[1], match[1])

    return [ENVIRONMENT_MACRO.sub(variable, str(word)) for word in command or DEFAULT_COMMAND]


@dataclass(frozen=True)
class TrialCommand:
    """What a trial reads from its command line.

    Attributes:
        layers: values, of which later ones win; None stands for the parameters of the sweep.
        drops_false: whether parameters that are false are left out.
    """

    layers: tuple[Mapping[str, Any] | None, ...] = (None,)
    drops_false: bool = False

    def values(self, parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the layers of a trial's configuration."""
        if self.drops_false:
            parameters = {key: value for key, value in parameters.items() if value is not False}
        return [parameters if layer is None else layer for layer in self.layers]

    def fixed(self, chosen: Collection[str]) -> dict[str, Any]:
        """Return the values that all trials have, by dotted key, without secrets.

        Args:
            chosen: dotted keys that the sweep chooses, and that the trials therefore do not read from the command.
        """
        values: dict[str, Any] = {}
        for layer in self.layers:
            values |= flatten_mapping(layer or {})
        known = {key: value for key, value in values.items() if key not in chosen and key != "log.dir"}
        plain: dict[str, Any] = json.loads(json.dumps(redacted(known), default=str))  # As they are read back.
        return plain

    @property
    def passes_all(self) -> bool:
        """Whether each trial has the values that the sweep chooses."""
        return self.layers[-1] is None and not self.drops_false


def read_command(command: Any, program: str | None) -> TrialCommand:
    """Read what a sweep's command gives each trial, without the sweep's parameters.

    Raises:
        ConfigError: if ``wandb agent`` or the trial cannot use the command.
    """
    example = "such as [${env}, ${interpreter}, -m, agent, ${args}]"
    if (command is None and program is None) or not isinstance(command, list | None):
        raise ConfigError(f"command = {shortened(command)}: expected a list that ends in ${{args}}, {example}")
    words = _filled_words(command)
    problems = [problem for word in words for problem in _macro_problems(word)]
    if "${program}" in words and program is None:
        problems.append("program = None: the command has ${program}; name a script, or put it into the command")
    passing = [place for place, word in enumerate(words) if word in PASSING]
    if not passing and not problems:
        problems.append(f"command = {shortened(command)}: passes no parameters; end it in ${{args}}, {example}")
    if problems:
        raise ConfigError(*problems)
    before = range(passing[0])
    programs = [i for i in before if words[i].endswith(".py") or words[i] == "${program}" or words[i - 1 : i] == ["-m"]]
    if not programs or not OURS.fullmatch(str(program) if words[programs[-1]] == "${program}" else words[programs[-1]]):
        return TrialCommand()
    return _read_words(words[programs[-1] + 1 :])


def _macro_problems(word: str) -> list[str]:
    if word.startswith("${") and word.endswith("}") and word not in MACROS:
        return [f"command = {word!r}: expected one of {', '.join(MACROS)}, ${{envvar:NAME}}"]
    inside = [macro for macro in MACROS if macro in word and macro != word]
    return [f"command = {word!r}: {macro} is filled in only as a word of its own; split it in two" for macro in inside]


def _read_words(words: Sequence[str]) -> TrialCommand:
    """Read the words after the program. Files are read first, whatever their place."""
    files: list[Mapping[str, Any] | None] = []
    layers: list[Mapping[str, Any] | None] = []
    own: list[str] = []

    def close() -> None:
        try:
            values = split_argv(own)
        except ConfigError as error:
            raise ConfigError(f"command = {error}") from None
        files.extend(read_yaml(Path(name)) for name in values.pop("config", ()))
        layers.extend([values] if values else [])
        own.clear()

    for word in words:
        if word not in PASSING:
            own.append(word)
            continue
        last = own[-1] if own else ""
        if word == JSON_FILE:
            if last != "--config":
                raise ConfigError(f"command = {word!r}: is no knob; write --config before it")
            own.pop()
        elif last.startswith("--") and "=" not in last and word not in HYPHENATED:
            raise ConfigError(f"command = {word!r}: becomes the value of {last}, which precedes it; use ${{args}}")
        close()
        (files if word == JSON_FILE else layers).append(None)
    close()
    return TrialCommand((*files, *layers), drops_false=NO_FALSE in words)
