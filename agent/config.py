"""The configuration of a trial: the core's knobs, pruning's knobs, and a preset to start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from diffusion_core.config import CoreConfig
from diffusion_core.config_io import build, read_yaml
from diffusion_core.presets import PRESETS
from pruning.config import PruneConfig


class TrialConfig(CoreConfig):
    """Everything that one trial depends on."""

    preset: Literal["cifar10", "cifar100", "mnist", "digits"] = "cifar10"
    """Starting point for all other knobs; what is given besides overrides it."""
    prune: PruneConfig = PruneConfig()

    @property
    def prune_step(self) -> int:
        """Optimizer steps before pruning."""
        return self.prune.step if self.prune.step is not None else max(1, self.train.steps // 2)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.prune.step is not None and self.prune.step >= self.train.steps:
            yield f"prune.step = {self.prune.step}: expected less than train.steps = {self.train.steps}"
        left = self.train.steps - self.prune_step
        if self.prune.method == "structured" and (self.ema.average_from or 0) >= left > 0:
            yield (
                f"ema.average_from = {self.ema.average_from}: averages start anew with the smaller network, {left} "
                f"steps before the end; expected less than that"
            )
        if self.prune.method != "none" and self.train.steps < 2:
            yield (
                f"train.steps = {self.train.steps}: prune.method={self.prune.method} needs at least 2, "
                f"before and after pruning"
            )


def build_config(*layers: Mapping[str, Any]) -> TrialConfig:
    """A trial's configuration from layers of values (later ones win), on top of the preset that they name.

    Raises:
        ConfigError: if a key, a value or a combination is wrong.
    """
    preset = TrialConfig.model_fields["preset"].default
    for layer in layers:
        preset = layer.get("preset", preset)
    # One that does not exist is found with all else that is wrong.
    start = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    return build(TrialConfig, start, *layers)


def config_from_words(words: Mapping[str, str]) -> TrialConfig:
    """A trial's configuration from command-line words; ``config`` names a YAML file that they override.

    Raises:
        ConfigError: if the file, a key, a value or a combination is wrong.
    """
    overrides = {key: value for key, value in words.items() if key != "config"}
    layers = [read_yaml(Path(words["config"]))] if "config" in words else []
    return build_config(*layers, overrides)
