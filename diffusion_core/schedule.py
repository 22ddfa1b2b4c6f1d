"""Noise schedules: how much signal and noise there is at each timestep, and which timesteps a sampler visits.

Notation of Kingma et al. 2021 (Variational Diffusion Models): ``x_t = alpha_t * x_0 + sigma_t * eps`` with
``alpha_t ** 2 + sigma_t ** 2 = 1``. Timesteps count 0..T-1 as in Ho et al. 2020: timestep 0 is the least noisy one,
and the clean image lies one step before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_core.config import DiffusionConfig

Spacing = Literal["uniform", "quadratic"]

COSINE_OFFSET = 0.008
MAX_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """Signal and noise amplitudes of the timesteps 0..T-1, float64 of shape ``(T,)``."""

    alphas: Tensor
    sigmas: Tensor

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """From the variances of the forward process's steps (Ho et al. 2020, eq. 4)."""
        alphas_bar = torch.cumprod(1.0 - betas.double(), dim=0)
        return cls(alphas_bar.sqrt(), (1.0 - alphas_bar).sqrt())

    @property
    def timesteps(self) -> int:
        return len(self.alphas)

    def at(self, t_B: Tensor, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of each sample, float32, shaped to broadcast against images: ``(B, 1, 1, 1)`` each."""
        shape = (-1,) + (1,) * (like_BCHW.ndim - 1)
        index = t_B.to(self.alphas.device)
        alpha, sigma = self.alphas[index], self.sigmas[index]
        return (
            alpha.to(like_BCHW.device, torch.float32).view(shape),
            sigma.to(like_BCHW.device, torch.float32).view(shape),
        )

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The forward process: a draw of ``q(x_t | x_0)`` (Ho et al. 2020, eq. 4) for given standard normal noise."""
        alpha, sigma = self.at(t_B, x0_BCHW)
        return alpha * x0_BCHW + sigma * noise_BCHW

    def to(self, device: torch.device) -> NoiseSchedule:
        return NoiseSchedule(self.alphas.to(device), self.sigmas.to(device))

    def steps(self, count: int, spacing: Spacing = "uniform") -> SamplingSteps:
        """The timesteps that a sampler with ``count`` steps visits, most noisy first (see :func:`spaced_timesteps`)."""
        timesteps = spaced_timesteps(self.timesteps, count, spacing)
        clean = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
        return SamplingSteps(
            timesteps=tuple(timesteps),
            alphas=torch.cat([self.alphas.cpu()[timesteps], clean[0]]),
            sigmas=torch.cat([self.sigmas.cpu()[timesteps], clean[1]]),
        )


@dataclass(frozen=True)
class SamplingSteps:
    """What a sampler needs to know of the schedule: S timesteps, most noisy first, and S+1 amplitudes.

    The last pair of amplitudes is (1, 0), the clean image. Float64 on the CPU.
    """

    timesteps: tuple[int, ...]
    alphas: Tensor
    sigmas: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


def spaced_timesteps(timesteps: int, count: int, spacing: Spacing) -> list[int]:
    """``count`` of the timesteps 0..T-1, descending.

    ``uniform``: evenly spaced from 0 to T-1, both visited (Nichol & Dhariwal 2021, section 4).
    ``quadratic``: evenly spaced square roots from 0 to 0.8 T, so finer near the image (Song et al. 2021, appendix
    D.2), then T-1, where sampling starts from pure noise.

    Raises:
        ValueError: if ``count`` is not in 1..T.
    """
    if not 1 <= count <= timesteps:
        raise ValueError(f"sample.steps = {count}: expected 1 to diffusion.timesteps = {timesteps}")
    if count == 1:
        return [timesteps - 1]
    if spacing == "uniform":
        chosen = torch.linspace(0, timesteps - 1, count, dtype=torch.float64).round().long().tolist()
    else:
        roots = torch.linspace(0, math.sqrt(0.8 * timesteps), count - 1, dtype=torch.float64)
        chosen = [*roots.square().long().tolist(), timesteps - 1]
        # Squares of small roots coincide: move each to the next free timestep, then down from the end if need be.
        for i in range(1, count):
            chosen[i] = max(chosen[i], chosen[i - 1] + 1)
        for i in range(count - 1, -1, -1):
            chosen[i] = min(chosen[i], timesteps - count + i)
    return chosen[::-1]


def linear_betas(timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Linearly growing variances (Ho et al. 2020, section 4).

    The two ends are meant for 1,000 steps; for other T they are scaled by 1000 / T, which keeps the total noise
    (Nichol & Dhariwal 2021), and capped at 0.999.
    """
    scale = 1000.0 / timesteps
    betas = torch.linspace(scale * beta_start, scale * beta_end, timesteps, dtype=torch.float64)
    return betas.clamp(max=MAX_BETA)


def cosine_betas(timesteps: int) -> Tensor:
    """Variances whose cumulative signal follows a squared cosine (Nichol & Dhariwal 2021, eq. 17), capped at 0.999."""
    position = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alphas_bar = torch.cos((position + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).square()
    return (1.0 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=MAX_BETA)


def build_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The schedule that a configuration asks for."""
    if config.schedule == "linear":
        return NoiseSchedule.from_betas(linear_betas(config.timesteps, config.beta_start, config.beta_end))
    return NoiseSchedule.from_betas(cosine_betas(config.timesteps))
