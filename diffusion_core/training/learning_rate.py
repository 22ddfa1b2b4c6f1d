"""The learning rate of a step, and of an optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.config import TrainConfig


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate. A tensor is changed in place, so that a recorded CUDA graph reads the new value."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@dataclass(frozen=True)
class Phase:
    """A part of a run with a learning rate schedule of its own.

    Attributes:
        start: step before it.
        end: its last step.
        lr: peak learning rate.
        warmup_steps: steps over which the rate rises from zero.
    """

    start: int
    end: int
    lr: float
    warmup_steps: int

    @classmethod
    def whole(cls, config: TrainConfig) -> Phase:
        """Return the only phase of a run."""
        return cls(0, config.steps, config.lr, config.warmup_steps)


def learning_rate(step: int, config: TrainConfig, phase: Phase | None = None) -> float:
    """Return the learning rate after ``step`` updates: linear warm-up, then constant or half a cosine."""
    phase = phase or Phase.whole(config)
    done, warmup = step - phase.start, phase.warmup_steps
    warm = min(1.0, (done + 1) / warmup) if warmup else 1.0
    if config.lr_schedule == "constant":
        return phase.lr * warm
    after = max(0, done - warmup) / max(1, phase.end - phase.start - warmup)
    return phase.lr * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, after)))
