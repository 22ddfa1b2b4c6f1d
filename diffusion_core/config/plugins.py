"""Users' own modules, which add records to the registries (:mod:`diffusion_core.registry`).

Importing a module runs its code. So only names that the user gave are imported: on the command line, in a file, in a
sweep. A checkpoint names its plugins too, but a file never decides what runs: they must be given again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_core.config.parsing import ConfigError
from diffusion_core.messages import one_line

KEY = "plugins"
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def plugin_names(value: Any) -> list[str]:
    """The module names in a value of the knob ``plugins``: a list, or text such as ``a,b`` or ``['a', 'b']``.

    Raises:
        ConfigError: if a name is no module's.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        value = [] if value is None else [value]
    for name in value:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(f"{KEY} = {name!r}: expected names of Python modules, such as my_package.samplers")
    return list(value)


def import_plugins(*layers: Mapping[str, Any]) -> None:
    """Import the plugins that the last layer with the key names.

    Raises:
        ConfigError: if one cannot be imported.
    """
    named = [layer[KEY] for layer in layers if KEY in layer]
    for name in plugin_names(named[-1] if named else None):
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            # A plugin is foreign code: whatever it raises, the remedy is the user's.
            reason = one_line(f"it calls sys.exit({error.code!r})" if isinstance(error, SystemExit) else error)
            raise ConfigError(
                f"{KEY} = {name!r}: cannot import it ({reason}); install it, or add its folder to PYTHONPATH"
            ) from None


def plugin_problems(values: Iterable[Any]) -> list[str]:
    """Import the plugins that several values of the knob name. Return what is wrong with the first one that fails."""
    try:
        for value in values:
            import_plugins({KEY: value})
    except ConfigError as error:
        return list(error.problems)
    return []


def missing_plugins(config: Mapping[str, Any]) -> str:
    """What to do about plugins that a stored configuration names and that are not imported; empty if all are."""
    with contextlib.suppress(ConfigError):
        missing = [name for name in plugin_names(config.get(KEY)) if name not in sys.modules]
        if missing:
            return (
                f"it was made with the plugin {', '.join(missing)}, which is not loaded: install it and give "
                f"--plugins={','.join(missing)} if you trust it"
            )
    return ""


def add_plugins_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag ``--plugins`` to a script that reads checkpoints; the modules are imported as it is parsed."""
    parser.add_argument(
        "--plugins",
        action=_ImportPlugins,
        default=[],
        metavar="A,B",
        help="your own modules that the model needs (docs/extending.md); imported only if they are named here",
    )


class _ImportPlugins(argparse.Action):
    """Import the modules that the flag names. If one cannot be, exit with one line, without argparse's usage."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            import_plugins({KEY: values})
        except ConfigError as error:
            parser.exit(2, f"error: {error}\n")
        setattr(namespace, self.dest, plugin_names(values))
