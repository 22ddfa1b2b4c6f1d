"""Gradual pruning: many small prunings during training, larger at first, smaller at the end (Zhu & Gupta 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusion_core.training.trainer import TrainState
from pruning.config import PruneConfig
from pruning.masks.build import choose_masks
from pruning.masks.mask import agreed, held_masks, hold_masks


@dataclass(frozen=True)
class Ramp:
    """The steps at which gradual pruning prunes, and the sparsity that it reaches.

    Attributes:
        start: step at which it starts. Nothing is pruned at this step.
        end: step of the last pruning, which :func:`pruning.pruner.prune_state` makes and records.
        interval: steps between two prunings.
    """

    start: int
    end: int
    interval: int

    def progress(self, step: int) -> float:
        """Return the share of the final sparsity at a step, in [0, 1] (eq. 1, from a sparsity of 0)."""
        done = min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))
        return 1.0 - (1.0 - done) ** 3

    def is_due(self, step: int) -> bool:
        """Return whether to prune at a step between start and end."""
        return self.start < step < self.end and (step - self.start) % self.interval == 0


class GradualPruning:
    """A training callback that prunes at the steps of a ramp.

    It has no state of its own: the training state holds the masks so far, and the step determines what is due. A
    resumed training therefore prunes as an uninterrupted one does. It must precede all callbacks that read weights.

    Args:
        ramp: when to prune.
        seed: seed of random choices.
        prune: the knobs of pruning: how much to prune, and how to rank weights.
    """

    def __init__(self, ramp: Ramp, seed: int, prune: PruneConfig) -> None:
        self.ramp = ramp
        self.seed = seed
        self.prune = prune

    def __call__(self, state: TrainState, _row: dict[str, Any]) -> None:
        """Prune to the ramp's sparsity if a pruning is due at this step."""
        if self.ramp.is_due(state.step):
            progress = self.ramp.progress(state.step)
            masks = choose_masks(state.network, held_masks(state), self.seed, self.prune, progress=progress)
            hold_masks(state, agreed(masks))
