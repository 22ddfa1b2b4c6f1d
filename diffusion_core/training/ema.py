"""Averages of the weights, which are sampled, validated and published.

A run may keep several: the exponential moving average, power functions of training time (EDM2), a plain average (SWA).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

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
        precise: the same averages in float64, by profile and name of the parameter, of the profiles whose updates
            become ever smaller. In float32, an update of 1e-7 of the average is lost, so that the average would stall.
            The networks hold them rounded to float32.
        updates: number of updates so far. All profiles depend on it, so checkpoints store it.
    """

    def __init__(self, network: UNet, config: EmaConfig) -> None:
        self.config = config
        self.updates = 0
        self.networks = {profile: copy.deepcopy(network).eval().requires_grad_(False) for profile in profiles(config)}
        # Keep lists of the tensors: walking through the modules takes longer than averaging small weights.
        self._averages = {profile: _tensors(averaged) for profile, averaged in self.networks.items()}
        self.precise = {
            profile: {
                name: weight.detach().to(torch.float64, copy=True) for name, weight in averaged.named_parameters()
            }
            for profile, averaged in self.networks.items()
            if profile != DECAY
        }
        self._followed: tuple[UNet, tuple[list[Tensor], list[Tensor]]] | None = None

    @property
    def network(self) -> UNet:
        """The average that is sampled, validated and published."""
        return self.networks[sampled_profile(self.config)]

    def load(self, profile: str, weights: Mapping[str, Tensor], precise: Mapping[str, Tensor] | None) -> None:
        """Continue from the average of a checkpoint.

        Args:
            profile: which average.
            weights: the state of its network.
            precise: its parameters in float64, of a profile in :attr:`precise`; None: those of the network, as older
                checkpoints have no others.
        """
        self.networks[profile].load_state_dict(weights)
        for name, average in self.precise.get(profile, {}).items():
            average.copy_(weights[name] if precise is None else precise[name])

    @torch.no_grad()
    def mask(self, factors: Mapping[str, Tensor]) -> None:
        """Multiply every average by factors, by name of the parameter, in place: 0 for pruned weights, else 1."""
        for averaged in self.networks.values():
            parameters = dict(averaged.named_parameters())
            torch._foreach_mul_([parameters[name] for name in factors], list(factors.values()))
        for averages in self.precise.values():
            for name, factor in factors.items():
                averages[name].mul_(factor)

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
            if profile in self.precise:
                for average, precise, weight in zip(averages, self.precise[profile].values(), weights, strict=True):
                    average.copy_(precise.lerp_(weight.double(), self.share(profile)))
            else:
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


def copies(config: EmaConfig) -> int:
    """Return the size of all averages, in networks of float32. One in float64 takes as much as two."""
    return sum(1 if profile == DECAY else 3 for profile in profiles(config))


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
