"""The configuration of a trial: the core's knobs, pruning's knobs, and a preset to start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from diffusion_core.config import CoreConfig
from diffusion_core.config_io import build, read_yaml
from diffusion_core.presets import PRESETS
from pruning.blocks import block_shares
from pruning.config import PruneConfig

AT_START = frozenset({"snip", "synflow"})
"""Methods that prune at initialisation unless they are told another step."""


class TrialConfig(CoreConfig):
    """Everything that one trial depends on."""

    preset: Literal["cifar10", "cifar100", "mnist", "digits"] = "cifar10"
    """Starting point for all other knobs; what is given besides overrides it."""
    prune: PruneConfig = PruneConfig()

    @property
    def prune_step(self) -> int:
        """Optimizer steps before pruning, or before its start (gradual)."""
        if self.prune.step is not None:
            return self.prune.step
        if self.prune.method in AT_START:
            return 0
        return max(1, self.train.steps // (4 if self.prune.method == "gradual" else 2))

    @property
    def prune_until(self) -> int:
        """Optimizer steps before pruning is complete: those before it, but for gradual pruning."""
        if self.prune.method != "gradual":
            return self.prune_step
        return self.prune.until if self.prune.until is not None else max(1, 3 * self.train.steps // 4)

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
        yield from self._mask_problems()
        if self.prune.method != "none" and self.train.steps < 2:
            yield (
                f"train.steps = {self.train.steps}: prune.method={self.prune.method} needs at least 2, "
                f"before and after pruning"
            )

    def _mask_problems(self) -> Iterator[str]:
        prune = self.prune
        try:
            block_shares(prune.block_keep, len(self.model.channel_multipliers))
        except ValueError as error:
            yield f"prune.block_keep = {prune.block_keep}: {error}"
        if prune.profile == "blocks" and not prune.block_keep:
            yield "prune.profile = 'blocks': needs prune.block_keep, such as down.0:0.5,middle:0.1"
        if prune.profile == "blocks" and prune.method == "lottery":
            yield "prune.profile = 'blocks': not for prune.method=lottery, whose rounds say how much stays; use erk"
        if prune.method == "gradual" and not self.prune_step < self.prune_until < self.train.steps:
            yield (
                f"prune.until = {self.prune_until}: expected more than prune.step = {self.prune_step} and less than "
                f"train.steps = {self.train.steps}"
            )
        if prune.method == "lottery" and prune.rewind_step >= self.train.steps:
            yield f"prune.rewind_step = {prune.rewind_step}: expected less than train.steps = {self.train.steps}"


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
