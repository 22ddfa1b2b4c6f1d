"""Gradual pruning: many small prunings while training goes on, more at first, fewer at last (Zhu & Gupta 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusion_core.training.trainer import TrainState
from pruning.config import PruneConfig
from pruning.masks.build import choose_masks
from pruning.masks.mask import agreed, held_masks, hold_masks


@dataclass(frozen=True)
class Ramp:
    """When gradual pruning prunes, and how far it has come then.

    Attributes:
        start: optimizer steps before it; nothing is pruned yet at this one.
        end: step of the last pruning, which is the pruner's (:func:`pruning.pruner.prune_state`) and is recorded.
        interval: steps between two prunings.
    """

    start: int
    end: int
    interval: int

    def progress(self, step: int) -> float:
        """Share of the final sparsity that is reached at a step, in [0, 1] (eq. 1, from a sparsity of 0)."""
        done = min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))
        return 1.0 - (1.0 - done) ** 3

    def is_due(self, step: int) -> bool:
        """Whether something is pruned at a step, on the way."""
        return self.start < step < self.end and (step - self.start) % self.interval == 0


class GradualPruning:
    """A training callback that prunes a little at every step of a ramp that is due.

    It has no state of its own: the masks so far are the training state's, and which step is due follows from the step,
    so that a resumed training prunes as the unbroken one does. It comes before all callbacks that look at weights.

    Args:
        ramp: when.
        seed: seed of random choices.
        prune: the knobs of pruning: how far, and how weights are ranked.
    """

    def __init__(self, ramp: Ramp, seed: int, prune: PruneConfig) -> None:
        self.ramp = ramp
        self.seed = seed
        self.prune = prune

    def __call__(self, state: TrainState, _row: dict[str, Any]) -> None:
        """Prune up to the ramp's share if a pruning is due at this step."""
        if self.ramp.is_due(state.step):
            progress = self.ramp.progress(state.step)
            masks = choose_masks(state.network, held_masks(state), self.seed, self.prune, progress=progress)
            hold_masks(state, agreed(masks))
