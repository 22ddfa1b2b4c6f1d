"""Noise schedules: how much signal and noise there is at each timestep, and which timesteps a sampler visits.

Notation of Kingma et al. 2021 (Variational Diffusion Models): ``x_t = alpha_t * x_0 + sigma_t * eps``. Timesteps count
0..T-1 as in Ho et al. 2020: timestep 0 is the least noisy one, and the clean image lies one step before it. Variance
preserving schedules have ``alpha ** 2 + sigma ** 2 = 1``; the variance exploding one has ``alpha = 1``. The noise level
of Karras et al. 2022 is ``sigma / alpha`` in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from diffusion_core.config import DiffusionConfig
from diffusion_core.registries import SCHEDULES

Spacing = Literal["uniform", "trailing", "quadratic", "karras"]

COSINE_OFFSET = 0.008
MAX_BETA = 0.999
SIGMOID_START, SIGMOID_END = -3.0, 3.0
MIN_ALPHA_BAR = 1e-9
KARRAS_RHO = 7.0
BEYOND_LAST = 10.0
"""Where the last timestep has no signal at all, and so no finite noise level: for positions between the timesteps it
counts as this many times the level before it."""

PURE_NOISE_LEVEL = 200.0
"""Above this noise level the image counts as lost; EDM starts at 80, the linear schedule at 157."""

KARRAS_START = 160.0
"""Largest noise level at which karras spacing enters a variance preserving schedule."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Signal and noise amplitudes of the timesteps 0..T-1, float64 of shape ``(T,)``."""

    alphas: Tensor
    sigmas: Tensor
    variance_preserving: bool = True

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """From the variances of the forward process's steps (Ho et al. 2020, eq. 4)."""
        return cls.from_alphas_bar(torch.cumprod(1.0 - betas.double(), dim=0))

    @classmethod
    def from_alphas_bar(cls, alphas_bar: Tensor) -> NoiseSchedule:
        """From the squared signal amplitudes."""
        return cls(alphas_bar.sqrt(), (1.0 - alphas_bar).sqrt())

    @property
    def timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self.alphas)

    @cached_property
    def levels(self) -> Tensor:
        """Noise levels ``sigma / alpha``, ascending; the last may be infinite."""
        return self.sigmas / self.alphas

    @cached_property
    def log_levels(self) -> Tensor:
        """Logarithms of the noise levels, finite: what positions between timesteps are interpolated in."""
        logs = self.levels.log()
        if torch.isinf(logs[-1]):
            logs = torch.cat([logs[:-1], logs[-2:-1] + math.log(BEYOND_LAST)])
        return logs

    def at(self, t_B: Tensor, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of each sample, float32, shaped to broadcast against images: ``(B, 1, 1, 1)`` each.

        Args:
            t_B: timesteps; floats may lie between two of them, where the logarithm of the noise level is linear.
            like_BCHW: a tensor of the images' number of axes and device.
        """
        t_B = t_B.to(self.alphas.device)
        if t_B.is_floating_point():
            below = t_B.double().floor().long().clamp(0, self.timesteps - 1)
            above = (below + 1).clamp(max=self.timesteps - 1)
            logs = torch.lerp(self.log_levels[below], self.log_levels[above], t_B.double() - below)
            alpha, sigma = self.amplitudes(logs.exp())
        else:
            alpha, sigma = self.alphas[t_B], self.sigmas[t_B]
        shape = (-1,) + (1,) * (like_BCHW.ndim - 1)
        return (
            alpha.to(like_BCHW.device, torch.float32).view(shape),
            sigma.to(like_BCHW.device, torch.float32).view(shape),
        )

    def amplitudes(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of given noise levels."""
        if not self.variance_preserving:
            return torch.ones_like(levels), levels
        alphas = (1.0 + levels.square()).rsqrt()
        return alphas, levels * alphas

    def position(self, levels: Tensor) -> Tensor:
        """The timestep at which the noise has given levels, float64 between 0 and T-1 (clamped to the ends)."""
        logs, known = levels.double().log(), self.log_levels.to(levels.device)
        above = torch.searchsorted(known, logs).clamp(1, self.timesteps - 1)
        share = (logs - known[above - 1]) / (known[above] - known[above - 1])
        return above - 1 + share.clamp(0.0, 1.0)

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The forward process: a draw of ``q(x_t | x_0)`` (Ho et al. 2020, eq. 4) for given standard normal noise."""
        alpha, sigma = self.at(t_B, x0_BCHW)
        return alpha * x0_BCHW + sigma * noise_BCHW

    def equals(self, other: NoiseSchedule) -> bool:
        """Whether another schedule has the same amplitudes."""
        if self.timesteps != other.timesteps:
            return False
        return torch.equal(self.alphas, other.alphas) and torch.equal(self.sigmas, other.sigmas)

    def to(self, device: torch.device) -> NoiseSchedule:
        """Return a copy on another device."""
        return NoiseSchedule(self.alphas.to(device), self.sigmas.to(device), self.variance_preserving)

    def steps(self, count: int, spacing: Spacing = "uniform") -> SamplingSteps:
        """The timesteps that a sampler with ``count`` steps visits, most noisy first.

        See :func:`spaced_timesteps`; ``karras`` spaces noise levels instead (Karras et al. 2022, eq. 5, rho 7), from
        the schedule's largest to its smallest, and so visits positions between timesteps. A variance preserving
        schedule that ends in still more noise (cosine: 20,000), or without any signal, is entered at
        ``KARRAS_START``: steps above it would be lost.

        Raises:
            ValueError: if ``count`` is not in 1..T.
        """
        if spacing == "karras":
            lowest, highest = float(self.log_levels[0].exp()), float(self.log_levels[-1].exp())
            if self.variance_preserving and lowest < KARRAS_START < highest:
                highest = KARRAS_START
            levels = karras_levels(count, lowest, highest).flip(0)
            timesteps = self.position(levels)
            alphas, sigmas = self.amplitudes(levels)
            visited: tuple[float, ...] = tuple(timesteps.tolist())
        else:
            chosen = spaced_timesteps(self.timesteps, count, spacing)
            alphas, sigmas = self.alphas.cpu()[chosen], self.sigmas.cpu()[chosen]
            visited = tuple(chosen)
        clean = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return SamplingSteps(visited, torch.cat([alphas, clean[0]]), torch.cat([sigmas, clean[1]]))


@dataclass(frozen=True)
class SamplingSteps:
    """What a sampler needs to know of the schedule: S timesteps, most noisy first, and S+1 amplitudes.

    The last pair of amplitudes is (1, 0), the clean image. Float64 on the CPU. Timesteps are integers, or floats where
    they lie between those that were trained.
    """

    timesteps: tuple[float, ...]
    alphas: Tensor
    sigmas: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def levels(self) -> list[float]:
        """The S+1 noise levels ``sigma / alpha``; the first may be infinite, the last is 0."""
        return (self.sigmas / self.alphas).tolist()

    def t(self, index: int, like_BCHW: Tensor) -> Tensor:
        """The timestep of a step for a whole batch, ``(B,)``: int64, or float32 between timesteps."""
        value = self.timesteps[index]
        dtype = torch.long if float(value).is_integer() else torch.float32
        return torch.full((len(like_BCHW),), value, dtype=dtype, device=like_BCHW.device)


def spaced_timesteps(timesteps: int, count: int, spacing: Spacing) -> list[int]:
    """``count`` of the timesteps 0..T-1, descending, from T-1 on.

    ``uniform``: evenly spaced from T-1 to 0, both visited (Nichol & Dhariwal 2021, section 4).
    ``trailing``: evenly spaced from T-1 on, a whole step above the clean image at the end (Lin et al. 2023, table 2).
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
        return torch.linspace(0, timesteps - 1, count, dtype=torch.float64).round().long().flip(0).tolist()
    if spacing == "trailing":
        return (torch.linspace(timesteps, timesteps / count, count, dtype=torch.float64).round().long() - 1).tolist()
    roots = torch.linspace(0, math.sqrt(0.8 * timesteps), count - 1, dtype=torch.float64)
    chosen = [*roots.square().long().tolist(), timesteps - 1]
    # Squares of small roots coincide: move each to the next free timestep, then down from the end if need be.
    for i in range(1, count):
        chosen[i] = max(chosen[i], chosen[i - 1] + 1)
    for i in range(count - 1, -1, -1):
        chosen[i] = min(chosen[i], timesteps - count + i)
    return chosen[::-1]


def karras_levels(count: int, lowest: float, highest: float) -> Tensor:
    """Ascending noise levels, evenly spaced in their 7th root (Karras et al. 2022, eq. 5): float64, ``(count,)``."""
    if count == 1:
        return torch.tensor([highest], dtype=torch.float64)
    ends = lowest ** (1 / KARRAS_RHO), highest ** (1 / KARRAS_RHO)
    return torch.linspace(*ends, count, dtype=torch.float64).pow(KARRAS_RHO)


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


def sigmoid_alphas_bar(timesteps: int) -> Tensor:
    """Squared signal amplitudes that follow a sigmoid from -3 to 3 (Jabri et al. 2022; Chen 2023, algorithm 1)."""
    position = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    at_start, at_end = (torch.tensor(end, dtype=torch.float64).sigmoid() for end in (SIGMOID_START, SIGMOID_END))
    here = (position * (SIGMOID_END - SIGMOID_START) + SIGMOID_START).sigmoid()
    return ((at_end - here) / (at_end - at_start)).clamp(min=MIN_ALPHA_BAR)


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Shift and scale the signal amplitudes so that the last is zero and the first stays (Lin et al. 2023, alg. 1)."""
    first, last = schedule.alphas[0], schedule.alphas[-1]
    alphas = (schedule.alphas - last) * first / (first - last)
    return NoiseSchedule.from_alphas_bar(alphas.square())


def shifted(schedule: NoiseSchedule, logsnr_shift: float) -> NoiseSchedule:
    """Add to the logarithm of the signal-to-noise ratio at every timestep (Hoogeboom et al. 2023, section 3.1)."""
    alphas, sigmas = schedule.amplitudes(schedule.levels * math.exp(-logsnr_shift / 2.0))
    return NoiseSchedule(alphas, sigmas, schedule.variance_preserving)


@dataclass(frozen=True)
class ScheduleRecord:
    """What is known of a noise schedule.

    Attributes:
        build: the schedule of given knobs, before shifts and rescaling.
        help: what it is, and its source.
        variance_preserving: whether ``alpha ** 2 + sigma ** 2 = 1``. Otherwise noise explodes: the network needs scaled
            inputs, and knobs that shift or rescale the schedule have no effect.
    """

    build: Callable[[DiffusionConfig], NoiseSchedule]
    help: str
    variance_preserving: bool = True


def _linear(config: DiffusionConfig) -> NoiseSchedule:
    return NoiseSchedule.from_betas(linear_betas(config.timesteps, config.beta_start, config.beta_end))


def _cosine(config: DiffusionConfig) -> NoiseSchedule:
    return NoiseSchedule.from_betas(cosine_betas(config.timesteps))


def _sigmoid(config: DiffusionConfig) -> NoiseSchedule:
    return NoiseSchedule.from_alphas_bar(sigmoid_alphas_bar(config.timesteps))


def _karras(config: DiffusionConfig) -> NoiseSchedule:
    levels = karras_levels(config.timesteps, config.sigma_min, config.sigma_max)
    return NoiseSchedule(torch.ones_like(levels), levels, variance_preserving=False)


SCHEDULES["linear"] = ScheduleRecord(_linear, "linearly growing variances (Ho et al. 2020)")
SCHEDULES["cosine"] = ScheduleRecord(_cosine, "a squared cosine of signal (Nichol & Dhariwal 2021)")
SCHEDULES["sigmoid"] = ScheduleRecord(_sigmoid, "a sigmoid of signal (Jabri et al. 2022)")
SCHEDULES["karras"] = ScheduleRecord(
    _karras,
    "variance exploding (Karras et al. 2022); needs diffusion.prediction=edm",
    variance_preserving=False,
)


def build_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The schedule that a configuration asks for."""
    record: ScheduleRecord = SCHEDULES[config.schedule]
    schedule = record.build(config)
    if not record.variance_preserving:
        return schedule
    if config.logsnr_shift:
        schedule = shifted(schedule, config.logsnr_shift)
    return zero_terminal_snr(schedule) if config.zero_terminal_snr else schedule
