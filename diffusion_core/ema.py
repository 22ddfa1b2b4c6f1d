"""Exponential moving average of the weights: what is sampled, validated and published."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from diffusion_core.config import EmaConfig
from diffusion_core.unet import UNet


class Ema:
    """A network whose weights follow another's by exponential averaging.

    Attributes:
        network: the averaged network, in evaluation mode (no dropout), without gradients.
        updates: number of updates so far; part of a checkpoint, since the warm-up depends on it.
    """

    def __init__(self, network: UNet, config: EmaConfig) -> None:
        self.config = config
        self.updates = 0
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def decay(self) -> float:
        """Decay of the next update."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, network: UNet) -> None:
        """Move towards ``network``: ``average = decay * average + (1 - decay) * weights``; buffers are copied."""
        averages: list[Tensor] = list(self.network.parameters())
        weights: list[Tensor] = [weight.detach() for weight in network.parameters()]
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay())
        for average, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)
        self.updates += 1
