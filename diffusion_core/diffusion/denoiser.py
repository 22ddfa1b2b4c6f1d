"""The parametrisation: what the network predicts, and how a clean image follows from it. It is known here alone.

Everything downstream (guidance, samplers) deals in denoisers: ``(x_BCHW, t_B, labels_B | None) -> x0_BCHW``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion_core.config import CoreConfig
from diffusion_core.diffusion.schedule import NoiseSchedule, build_schedule

DenoiserFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Noisy images, timesteps 0..T-1 and labels (None: no class) to the expected clean images, in [-1, 1]."""

Prediction = Literal["eps", "x0", "v", "edm"]

SIGMA_DATA = 0.5
"""Standard deviation of the data that EDM's preconditioning assumes (Karras et al. 2022, table 1)."""


class Denoiser:
    """A network, seen as a denoiser.

    Args:
        network: ``(x_BCHW, t_B, labels_B | None) -> output``. With self-conditioning it takes twice the channels, with
            a learned variance it gives twice the channels.
        schedule: the noise schedule that the network was trained with.
        prediction: what its output stands for, with ``x = alpha * x0 + sigma * eps``: ``eps`` (Ho et al. 2020), ``x0``,
            ``v = alpha * eps - sigma * x0`` (Salimans & Ho 2022), or ``edm``, the preconditioned network of Karras et
            al. 2022 (eq. 7) at the noise level ``sigma / alpha``.
        learned_variance: whether the second half of the output's channels says where the variance of a reverse step
            lies between its bounds (Nichol & Dhariwal 2021, eq. 15).
        self_conditioning: whether the network is shown its last estimate of the clean images (Chen et al. 2022, Analog
            Bits). A denoiser then remembers it from call to call: make a new one for every batch that is sampled.
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        schedule: NoiseSchedule,
        prediction: Prediction = "eps",
        *,
        learned_variance: bool = False,
        self_conditioning: bool = False,
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.learned_variance = learned_variance
        self.self_conditioning = self_conditioning
        self.fraction_BCHW: Tensor | None = None
        self._estimate_BCHW: Tensor | None = None

    @classmethod
    def from_config(
        cls, network: nn.Module | Callable[..., Tensor], config: CoreConfig, device: torch.device
    ) -> Denoiser:
        """The denoiser that a configuration's network is."""
        return cls(
            network,
            build_schedule(config.diffusion).to(device),
            config.diffusion.prediction,
            learned_variance=config.model.learned_variance,
            self_conditioning=config.model.self_conditioning,
        )

    def predict(
        self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None, estimate_BCHW: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The network's own output, in float32, and the variance fraction in [0, 1] if it is learned.

        Args:
            x_BCHW: noisy images.
            t_B: timesteps.
            labels_B: classes.
            estimate_BCHW: for self-conditioning, an earlier estimate of the clean images; None is none.
        """
        inputs = x_BCHW
        if self.prediction == "edm":
            alpha, sigma = self.schedule.at(t_B, x_BCHW)
            inputs = x_BCHW / alpha * ((sigma / alpha).square() + SIGMA_DATA**2).rsqrt()
        if self.self_conditioning:
            inputs = torch.cat([inputs, torch.zeros_like(x_BCHW) if estimate_BCHW is None else estimate_BCHW], dim=1)
        output = self.network(inputs, t_B, labels_B).float()
        if not self.learned_variance:
            return output, None
        output, between = output.chunk(2, dim=1)
        return output, (between + 1.0) / 2.0

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the network's output is trained to equal."""
        if self.prediction == "eps":
            return noise_BCHW
        if self.prediction == "x0":
            return x0_BCHW
        alpha, sigma = self.schedule.at(t_B, x0_BCHW)
        if self.prediction == "v":
            return alpha * noise_BCHW - sigma * x0_BCHW
        skip, scale = self._preconditioning(sigma / alpha)
        return (x0_BCHW - skip * (x0_BCHW + sigma / alpha * noise_BCHW)) / scale

    def clean(self, output_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The clean images that the network's output stands for."""
        if self.prediction == "x0":
            return output_BCHW
        alpha, sigma = self.schedule.at(t_B, x_BCHW)
        if self.prediction == "eps":
            return (x_BCHW - sigma * output_BCHW) / alpha
        if self.prediction == "v":
            return (alpha * x_BCHW - sigma * output_BCHW) / (alpha.square() + sigma.square())
        skip, scale = self._preconditioning(sigma / alpha)
        return skip * x_BCHW / alpha + scale * output_BCHW

    @staticmethod
    def _preconditioning(level: Tensor) -> tuple[Tensor, Tensor]:
        """``c_skip`` and ``c_out`` of Karras et al. 2022, table 1."""
        total = level.square() + SIGMA_DATA**2
        return SIGMA_DATA**2 / total, level * SIGMA_DATA * total.rsqrt()

    def error_scale(self, t_B: Tensor) -> Tensor:
        """Squared error of the output per squared error of the clean images, ``(B,)`` float32.

        What turns a weighting of one into a weighting of the other: SNR for eps, 1 for x0, SNR + 1 for v, and the EDM
        weighting for edm.
        """
        alpha, sigma = (part.flatten() for part in self.schedule.at(t_B, t_B[:, None, None, None].float()))
        if self.prediction == "x0":
            return torch.ones_like(alpha)
        if self.prediction == "edm":
            return self._preconditioning(sigma / alpha)[1].square().reciprocal()
        if self.prediction == "eps":
            return (alpha / sigma).square()
        return ((alpha.square() + sigma.square()) / sigma).square()

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        """Estimate the clean images, float32. Keeps the variance fraction, and the estimate for the next call."""
        output, self.fraction_BCHW = self.predict(x_BCHW, t_B, labels_B, self._remembered(len(x_BCHW)))
        x0_BCHW = self.clean(output, x_BCHW, t_B)
        if self.self_conditioning:
            self._estimate_BCHW = x0_BCHW.clamp(-1.0, 1.0)
        return x0_BCHW

    def _remembered(self, batch: int) -> Tensor | None:
        """The last estimate, for a batch that may have been doubled for guidance or halved again since."""
        estimate = self._estimate_BCHW
        if estimate is None or len(estimate) == batch:
            return estimate
        return estimate[:batch] if len(estimate) > batch else estimate.repeat(batch // len(estimate), 1, 1, 1)


def clipped(denoiser: DenoiserFunction) -> DenoiserFunction:
    """A denoiser whose images are clipped to [-1, 1], as Ho et al. 2020 do at every sampling step."""

    def clipped_denoiser(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        return denoiser(x_BCHW, t_B, labels_B).clamp(-1.0, 1.0)

    return clipped_denoiser
