"""Averages of the weights, which are sampled, validated and published.

A run may keep several: the exponential moving average, power functions of training time (EDM2), a plain average (SWA).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from diffusion_core.config import EmaConfig
from diffusion_core.model.unet import UNet

DECAY = "decay"
AVERAGE = "average"


class Ema:
    """Networks whose weights average those of another network, one per profile of the configuration.

    Attributes:
        networks: the averaged networks by profile, in evaluation mode (no dropout), without gradients.
        updates: number of updates so far. All profiles depend on it, so checkpoints store it.
    """

    def __init__(self, network: UNet, config: EmaConfig) -> None:
        self.config = config
        self.updates = 0
        self.networks = {profile: copy.deepcopy(network).eval().requires_grad_(False) for profile in profiles(config)}
        # Keep lists of the tensors: walking through the modules takes longer than averaging small weights.
        self._averages = {profile: _tensors(averaged) for profile, averaged in self.networks.items()}
        self._followed: tuple[UNet, tuple[list[Tensor], list[Tensor]]] | None = None

    @property
    def network(self) -> UNet:
        """The average that is sampled, validated and published."""
        return self.networks[sampled_profile(self.config)]

    def share(self, profile: str) -> float:
        """Return the weight of the new weights in a profile's next update, in [0, 1]."""
        count = self.updates + 1
        if profile == DECAY:
            decay = self.config.decay
            return 1.0 - (min(decay, (1 + self.updates) / (10 + self.updates)) if self.config.warmup else decay)
        if profile == AVERAGE:
            return 1.0 / max(1, count - (self.config.average_from or 0))
        gamma = power_exponent(widths(self.config)[profile])
        return 1.0 - (1.0 - 1.0 / count) ** (gamma + 1.0)

    @torch.no_grad()
    def update(self, network: UNet) -> None:
        """Update every average: ``average += share * (weights - average)``. Buffers are copied."""
        if self._followed is None or self._followed[0] is not network:
            self._followed = network, _tensors(network)
        weights, buffers = self._followed[1]
        for profile, (averages, copies) in self._averages.items():
            torch._foreach_lerp_(averages, weights, self.share(profile))
            for average, buffer in zip(copies, buffers, strict=True):
                average.copy_(buffer)
        self.updates += 1


def _tensors(network: UNet) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights and the buffers of a network."""
    return list(network.parameters()), list(network.buffers())


def widths(config: EmaConfig) -> dict[str, float]:
    """Return the relative widths of the power profiles by name (``power0_05``)."""
    return {f"power{width:g}".replace(".", "_"): width for width in config.power_widths}


def profiles(config: EmaConfig) -> list[str]:
    """Return the names of the averages that a configuration asks for."""
    return [DECAY, *widths(config), *([AVERAGE] if config.average_from is not None else [])]


def sampled_profile(config: EmaConfig) -> str:
    """Return the name of the average that is sampled."""
    return next(iter(widths(config))) if config.sampled == "power" else config.sampled


def power_exponent(width: float) -> float:
    """Return the exponent gamma of the power function average with a relative width.

    See Karras et al. 2024 (EDM2), eq. 9 and 126. The average weighs the weights at training time t by ``t ** gamma``.
    Its standard deviation, relative to training time, is ``(gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)``,
    solved here by bisection.

    Args:
        width: in (0, 0.28), such as 0.05 or 0.1.
    """

    def relative_width(gamma: float) -> float:
        return math.sqrt(gamma + 1.0) / ((gamma + 2.0) * math.sqrt(gamma + 3.0))

    low, high = 0.0, 1e6  # The width decreases from 0.2887 at 0.
    for _ in range(200):
        middle = (low + high) / 2.0
        low, high = (middle, high) if relative_width(middle) > width else (low, middle)
    return (low + high) / 2.0
