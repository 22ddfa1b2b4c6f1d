"""The parametrisation: what the network predicts, and how a clean image follows from it. It is known here alone.

Everything downstream (guidance, samplers) deals in denoisers: ``(x_BCHW, t_B, labels_B | None) -> x0_BCHW``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from diffusion_core.schedule import NoiseSchedule

DenoiserFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Noisy images, timesteps 0..T-1 and labels (None: no class) to the expected clean images, in [-1, 1]."""


class Denoiser:
    """A network that predicts the noise eps (Ho et al. 2020, eq. 14), seen as a denoiser.

    Args:
        network: ``(x_BCHW, t_B, labels_B | None) -> eps_BCHW``.
        schedule: the noise schedule that the network was trained with.
    """

    def __init__(self, network: nn.Module | DenoiserFunction, schedule: NoiseSchedule) -> None:
        self.network = network
        self.schedule = schedule

    def predict(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        """The network's own output, in float32."""
        return self.network(x_BCHW, t_B, labels_B).float()

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the network's output is trained to equal."""
        return noise_BCHW

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        alpha, sigma = self.schedule.at(t_B, x_BCHW)
        return (x_BCHW - sigma * self.predict(x_BCHW, t_B, labels_B)) / alpha


def clipped(denoiser: DenoiserFunction) -> DenoiserFunction:
    """A denoiser whose images are clipped to [-1, 1], as Ho et al. 2020 do at every sampling step."""

    def clipped_denoiser(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        return denoiser(x_BCHW, t_B, labels_B).clamp(-1.0, 1.0)

    return clipped_denoiser
