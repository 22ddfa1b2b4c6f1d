"""The configuration of a trial: the knobs of the core and of pruning, and a preset to start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from diffusion_core.config import (
    PRESETS,
    ConfigError,
    CoreConfig,
    DistillConfig,
    InitConfig,
    StepsConfig,
    build,
    read_yaml,
)
from diffusion_core.config.checks import leaking_problems
from diffusion_core.config.plugins import import_plugins
from diffusion_core.registry import Choice
from pruning.checks import combination_problems, costly_problems
from pruning.config import PruneConfig


class TrialConfig(CoreConfig):
    """Everything that one trial depends on."""

    preset: Annotated[str, Choice(PRESETS)] = "cifar10"
    """Starting point of all other knobs. Whatever else is set overrides it."""
    prune: PruneConfig = PruneConfig()
    init: InitConfig = InitConfig()
    distill: DistillConfig = DistillConfig()
    steps: StepsConfig = StepsConfig()

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        yield from leaking_problems(self.upsample, self.eval)
        yield from combination_problems(self.prune, self.init, self.distill, self.model, self.train, self.ema)
        yield from costly_problems(self, self.steps, self.prune, self.init, self.distill)

    def logged_figures(self) -> list[str]:
        """Names of the figures that are better one way. A student of step distillation has no ``val/loss``."""
        names = super().logged_figures()
        return [name for name in names if not name.startswith("val/")] if self.steps.wanted else names


def build_config(*layers: Mapping[str, Any]) -> TrialConfig:
    """Build a trial's configuration from layers of values, on top of the preset that they name. Later layers win.

    Raises:
        ConfigError: if a key, a value or a combination is wrong.
    """
    import_plugins(*layers)
    preset = TrialConfig.model_fields["preset"].default
    for layer in layers:
        preset = layer.get("preset", preset)
    # `build` reports an unknown preset together with all other problems.
    start = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    return build(TrialConfig, start, *layers)


def config_from_words(words: Mapping[str, Any]) -> TrialConfig:
    """Build a trial's configuration from command-line words. ``config`` lists YAML files, which they override.

    Raises:
        ConfigError: if a file, a key, a value or a combination is wrong.
    """
    overrides = {key: value for key, value in words.items() if key != "config"}
    return build_config(*map(read_values, words.get("config", ())), overrides)


def read_values(name: str) -> dict[str, Any]:
    """Read a file of knobs.

    Raises:
        ConfigError: if it cannot be read, or is a sweep file.
    """
    values = read_yaml(Path(name))
    if "parameters" in values and "method" in values:
        raise ConfigError(f"--config = {name!r}: is a sweep file; run it with `python -m agent.sweep {name}`")
    return values
