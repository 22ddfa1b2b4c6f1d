"""What a network is trained for: the draws of a step, and the loss of each image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from diffusion_core.config import DiffusionConfig
from diffusion_core.data.batches import Batches
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.draws import Draws
from diffusion_core.diffusion.losses import diffusion_loss
from diffusion_core.diffusion.schedule import NoiseSchedule


class Objective(Protocol):
    """Signature of all objectives."""

    def draw(self, step: int, batches: Batches, schedule: NoiseSchedule) -> Draws:
        """Return this process's share of a step's draws. They depend on seed and step only."""

    def loss(self, denoiser: Denoiser, draws: Draws) -> Tensor:
        """Return the unreduced loss, ``(B,)`` float32. It reads no value on the processor (CUDA graphs).

        The denoiser has what the draws give (:meth:`Denoiser.with_given`).
        """


class Denoising:
    """The objective of diffusion models: :func:`~diffusion_core.diffusion.losses.diffusion_loss`.

    Args:
        diffusion: the loss's knobs.
        draws: returns a step's draws.
    """

    def __init__(self, diffusion: DiffusionConfig, draws: Callable[[int, Batches, NoiseSchedule], Draws]) -> None:
        self.diffusion = diffusion
        self.draws = draws

    def draw(self, step: int, batches: Batches, schedule: NoiseSchedule) -> Draws:
        """Return this process's share of a step's draws."""
        return self.draws(step, batches, schedule)

    def loss(self, denoiser: Denoiser, draws: Draws) -> Tensor:
        """Return the unreduced loss, ``(B,)`` float32."""
        return diffusion_loss(
            denoiser,
            draws.x0_BCHW,
            draws.noise_BCHW,
            draws.t_B,
            draws.labels_B,
            self.diffusion,
            draws.shown_B,
        )
