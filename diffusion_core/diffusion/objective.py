"""What a network is trained for: the draws of a step, and the loss of each image."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from diffusion_core.config import CoreConfig
from diffusion_core.data.batches import Batches
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.draws import Draws, draw
from diffusion_core.diffusion.losses import diffusion_loss
from diffusion_core.diffusion.schedule import NoiseSchedule


class Objective(Protocol):
    """Signature of all objectives."""

    def draw(self, step: int, batches: Batches, schedule: NoiseSchedule) -> Draws:
        """Return this process's share of a step's draws. They depend on seed and step only."""

    def loss(self, denoiser: Denoiser, draws: Draws) -> Tensor:
        """Return the unreduced loss, ``(B,)`` float32. It reads no value on the processor (CUDA graphs)."""


class Denoising:
    """The objective of diffusion models: :func:`~diffusion_core.diffusion.losses.diffusion_loss`.

    Args:
        config: every knob of the core.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config

    def draw(self, step: int, batches: Batches, schedule: NoiseSchedule) -> Draws:
        """Return this process's share of a step's draws."""
        return draw(step, batches, self.config, schedule)

    def loss(self, denoiser: Denoiser, draws: Draws) -> Tensor:
        """Return the unreduced loss, ``(B,)`` float32."""
        return diffusion_loss(
            denoiser,
            draws.x0_BCHW,
            draws.noise_BCHW,
            draws.t_B,
            draws.labels_B,
            self.config.diffusion,
            draws.shown_B,
        )
