"""The configuration of a trial: the core's knobs, pruning's knobs, and a preset to start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from diffusion_core.config import PRESETS, CoreConfig, DistillConfig, InitConfig, build, read_yaml
from diffusion_core.config.plugins import import_plugins
from diffusion_core.registry import Choice
from pruning.config import PruneConfig


class TrialConfig(CoreConfig):
    """Everything that one trial depends on."""

    preset: Annotated[str, Choice(PRESETS)] = "cifar10"
    """Starting point for all other knobs; what is given besides overrides it."""
    prune: PruneConfig = PruneConfig()
    init: InitConfig = InitConfig()
    distill: DistillConfig = DistillConfig()

    @property
    def prune_step(self) -> int:
        """Optimizer steps before pruning, or before its start (gradual)."""
        if self.prune.step is not None:
            return self.prune.step
        if self.prune.at_start:
            return 0
        return max(1, self.train.steps // (4 if self.prune.is_gradual else 2))

    @property
    def prune_until(self) -> int:
        """Optimizer steps before pruning is complete: those before it, but for gradual pruning."""
        if not self.prune.is_gradual:
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
        if self.prune.method != "none" and self.prune.step is None and self.train.steps < 2:
            yield (
                f"train.steps = {self.train.steps}: prune.method={self.prune.method} needs at least 2, "
                f"before and after pruning"
            )
        blocks = 2 * len(self.model.channel_multipliers) + 1
        if self.prune.block_keep and len(self.prune.block_keep) != blocks:
            yield (
                f"prune.block_keep = {self.prune.block_keep}: expected {blocks} shares, of "
                f"{len(self.model.channel_multipliers)} resolutions on the way down, the middle, and the way up again"
            )
        if self.prune.block_keep and min(self.prune.block_keep) == 1.0:
            yield f"prune.block_keep = {self.prune.block_keep}: spares all blocks; expected at least one share below 1"
        for section, one in (("init", self.init), ("distill", self.distill)):
            if one.checkpoint is not None and one.artifact is not None:
                yield f"{section}.artifact = {one.artifact!r}: {section}.checkpoint is given too; expected one of them"
        if self.init.artifact is not None and self.init.weights != "ema":
            yield f"init.weights = {self.init.weights!r}: artifacts hold the averaged weights; expected ema"
        if self.init.checkpoint is None and self.init.artifact is None and self.init.weights != "ema":
            yield f"init.weights = {self.init.weights!r}: says nothing without init.checkpoint"
        teacher = self.distill.checkpoint or self.distill.artifact
        if self.distill.wanted and teacher is None and self.prune.method == "none":
            yield (
                "distill.checkpoint = None: no teacher; set it or distill.artifact, or prune.method, whose dense "
                "network teaches"
            )
        if teacher is not None and not self.distill.wanted:
            yield (
                f"distill.output = {self.distill.output}: the teacher {teacher!r} says nothing while it and "
                "distill.features are 0"
            )

    def _mask_problems(self) -> Iterator[str]:
        prune = self.prune
        if prune.profile == "blocks" and not prune.block_keep:
            yield "prune.profile = 'blocks': needs prune.block_keep, such as 0.5,0.5,0.2,0.5,0.5 for two resolutions"
        if prune.profile == "blocks" and prune.method == "lottery":
            yield "prune.profile = 'blocks': not for prune.method=lottery, whose rounds say how much stays; use erk"
        if prune.is_gradual and not self.prune_step < self.prune_until < self.train.steps:
            yield (
                f"prune.until = {self.prune_until}: expected more than prune.step = {self.prune_step} and less than "
                f"train.steps = {self.train.steps}"
            )
        if prune.method == "lottery":
            yield from self._lottery_problems()

    def _lottery_problems(self) -> Iterator[str]:
        prune = self.prune
        if self.init.checkpoint is not None or self.init.artifact is not None:
            key = "init.checkpoint" if self.init.checkpoint else "init.artifact"
            start = self.init.checkpoint or self.init.artifact
            yield f"{key} = {start!r}: not for prune.method=lottery, whose dense network starts from nothing"
        if self.distill.wanted:
            yield (
                f"distill.output = {self.distill.output}: not for prune.method=lottery, whose tickets train as the "
                f"dense network did"
            )
        if prune.rewind_step >= self.train.steps:
            yield f"prune.rewind_step = {prune.rewind_step}: expected less than train.steps = {self.train.steps}"


def build_config(*layers: Mapping[str, Any]) -> TrialConfig:
    """A trial's configuration from layers of values (later ones win), on top of the preset that they name.

    Raises:
        ConfigError: if a key, a value or a combination is wrong.
    """
    import_plugins(*layers)
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
