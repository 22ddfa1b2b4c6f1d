"""RigL (Evci et al. 2020): sparse training in which masks move. Weights are dropped by magnitude, grown by gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusion_core.model.structure import maskable
from diffusion_core.training.trainer import TrainState
from pruning.calibration import Calibration
from pruning.masks.mask import WeightMasks, agreed, held_masks, hold_masks
from pruning.masks.strategies import keep_highest


def drop_fraction(step: int, end: int, alpha: float) -> float:
    """Return the share of a layer's weights that an update drops (section 3): ``alpha / 2 * (1 + cos(pi t / T_end))``.

    Args:
        step: optimizer steps so far, t.
        end: step from which masks stay, T_end.
        alpha: share at step 0.
    """
    return alpha / 2.0 * (1.0 + math.cos(math.pi * step / end))


def regrown(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], gradients: Mapping[str, Tensor], fraction: float
) -> WeightMasks:
    """Return the masks after an update (algorithm 1). Every layer keeps its number of weights.

    Each layer drops the ``fraction`` of its weights with the smallest magnitudes, rounded down. It grows as many where
    the gradient of the loss is largest among all that are not left, which may be those just dropped.

    Args:
        weights: weights by name.
        masks: the masks so far.
        gradients: gradients of the loss by all weights, also those that are pruned.
        fraction: result of :func:`drop_fraction`.
    """
    updated: WeightMasks = {}
    for name, mask in masks.items():
        count = int(mask.sum())
        changed = int(fraction * count)
        left = keep_highest({name: weights[name].abs()}, {name: mask}, count - changed)[name]
        grown = keep_highest({name: gradients[name].abs()}, {name: ~left}, changed)[name]
        updated[name] = left | grown
    return updated


class Regrowth:
    """A training callback that moves the masks of a pruned state every few steps.

    It has no state of its own: the training state holds the masks, and the step determines the images and what is due.
    A resumed training therefore moves them as an uninterrupted one does. It must precede all callbacks that read
    weights. Weights that grow are zero at first, and so are their moments and averages.

    Args:
        calibration: the training images of the gradients, one batch for each update.
        start: step of the pruning.
        end: step from which masks stay.
        interval: steps between two updates.
        alpha: share of a layer's weights that the first updates drop.
    """

    def __init__(self, calibration: Calibration, *, start: int, end: int, interval: int, alpha: float) -> None:
        self.calibration = calibration
        self.start = start
        self.end = end
        self.interval = interval
        self.alpha = alpha

    def is_due(self, step: int) -> bool:
        """Return whether to update the masks after a step."""
        return self.start < step < self.end and (step - self.start) % self.interval == 0

    def __call__(self, state: TrainState, _row: dict[str, Any]) -> None:
        """Update the masks if that is due."""
        masks = held_masks(state)
        if masks is None or not self.is_due(state.step):
            return
        dense = copy.deepcopy(state.network).requires_grad_(True)  # A copy has no hooks, which hide gradients.
        gradients = self.calibration.gradient(dense, state.step)
        fraction = drop_fraction(state.step, self.end, self.alpha)
        hold_masks(state, agreed(regrown(maskable(state.network), masks, gradients, fraction)))
