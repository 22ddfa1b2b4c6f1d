"""Noise schedules: the amplitudes of signal and noise at each timestep.

Notation of Kingma et al. 2021 (Variational Diffusion Models): ``x_t = alpha_t * x_0 + sigma_t * eps``. Timesteps are
0..T-1 as in Ho et al. 2020: timestep 0 has the least noise, and the clean image is one step before it. Variance
preserving schedules have ``alpha ** 2 + sigma ** 2 = 1``. The variance exploding schedule has ``alpha = 1``. The noise
level of Karras et al. 2022 is ``sigma / alpha`` in both cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffusion_core.config import ConfigError, DiffusionConfig
from diffusion_core.diffusion.sampling_steps import SamplingSteps, Spacing, karras_levels, spaced_timesteps
from diffusion_core.registries import SCHEDULES

COSINE_OFFSET = 0.008
MAX_BETA = 0.999
SIGMOID_START, SIGMOID_END = -3.0, 3.0
MIN_ALPHA_BAR = 1e-9
BEYOND_LAST = 10.0
"""Replaces an infinite last noise level (no signal) when levels are interpolated: this many times the level before."""

PURE_NOISE_LEVEL = 200.0
"""Noise level above which an image counts as pure noise. EDM starts at 80, the linear schedule at 157."""

KARRAS_START = 160.0
"""Largest noise level at which karras spacing starts in a variance preserving schedule."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Signal and noise amplitudes of the timesteps 0..T-1, float64 of shape ``(T,)``."""

    alphas: Tensor
    sigmas: Tensor
    variance_preserving: bool = True

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """Return the schedule with these variances of the forward steps (Ho et al. 2020, eq. 4)."""
        return cls.from_alphas_bar(torch.cumprod(1.0 - betas.double(), dim=0))

    @classmethod
    def from_alphas_bar(cls, alphas_bar: Tensor) -> NoiseSchedule:
        """Return the variance preserving schedule with these squared signal amplitudes."""
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
        """Logarithms of the noise levels, all finite, for interpolation between timesteps."""
        logs = self.levels.log()
        if len(logs) == 1:
            return logs
        beyond = logs[-2:-1] + math.log(BEYOND_LAST)
        # Not a branch, which would wait for a GPU to tell.
        return torch.cat([logs[:-1], torch.where(torch.isinf(logs[-1:]), beyond, logs[-1:])])

    def at(self, t_B: Tensor, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of each image, float32, shaped to broadcast against images: ``(B, 1, 1, 1)`` each.

        Args:
            t_B: timesteps; floats may lie between two timesteps, where the log noise level is interpolated linearly.
            like_BCHW: a tensor with the images' number of axes and their device.
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
        """Return alpha and sigma at given noise levels."""
        if not self.variance_preserving:
            return torch.ones_like(levels), levels
        alphas = (1.0 + levels.square()).rsqrt()
        return alphas, levels * alphas

    def position(self, levels: Tensor) -> Tensor:
        """Return the timesteps of given noise levels, float64 in [0, T-1] (clamped), which may not be integers."""
        logs, known = levels.double().log(), self.log_levels.to(levels.device)
        above = torch.searchsorted(known, logs).clamp(1, self.timesteps - 1)
        share = (logs - known[above - 1]) / (known[above] - known[above - 1])
        return above - 1 + share.clamp(0.0, 1.0)

    def level(self, t_B: Tensor) -> Tensor:
        """Return the noise levels of timesteps, ``(B,)`` float64, all finite: the inverse of :meth:`position`."""
        at_B, logs = t_B.double().clamp(0, self.timesteps - 1), self.log_levels.to(t_B.device)
        below = at_B.floor().long()
        above = (below + 1).clamp(max=self.timesteps - 1)
        return torch.lerp(logs[below], logs[above], at_B - below).exp()

    def timesteps_to(self, level: float | None) -> int:
        """Return how many timesteps have at most a noise level: T if it is None, and never less than 1."""
        if level is None:
            return self.timesteps
        return max(1, int((self.levels <= level).sum()))

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Sample the forward process ``q(x_t | x_0)`` (Ho et al. 2020, eq. 4) with given standard normal noise."""
        alpha, sigma = self.at(t_B, x0_BCHW)
        return alpha * x0_BCHW + sigma * noise_BCHW

    def equals(self, other: NoiseSchedule) -> bool:
        """Return whether another schedule has the same amplitudes."""
        if self.timesteps != other.timesteps:
            return False
        return torch.equal(self.alphas, other.alphas) and torch.equal(self.sigmas, other.sigmas)

    def to(self, device: torch.device) -> NoiseSchedule:
        """Return a copy on another device."""
        return NoiseSchedule(self.alphas.to(device), self.sigmas.to(device), self.variance_preserving)

    def steps(self, count: int, spacing: Spacing = "uniform", start_level: float | None = None) -> SamplingSteps:
        """Return the timesteps that a sampler visits in ``count`` steps, most noisy first.

        See :func:`spaced_timesteps`. ``karras`` spaces noise levels instead (Karras et al. 2022, eq. 5, rho 7), from
        the schedule's largest to its smallest, and so visits positions between timesteps. In a variance preserving
        schedule with a larger last level (cosine: 20,000), or without signal at the end, it starts at
        ``KARRAS_START``, because steps above it would be wasted.

        Args:
            count: number of steps.
            spacing: which timesteps are visited.
            start_level: timesteps of larger noise levels are left out, and the rest is spaced as if it were all; None:
                none.

        Raises:
            ValueError: if ``count`` is not in 1..T.
            ConfigError: if it is larger than the number of timesteps up to ``start_level``.
        """
        known = self.timesteps_to(start_level)
        if start_level is not None and count > known:
            raise ConfigError(
                f"sample.steps = {count}: expected at most {known}, the timesteps up to sample.start_level = "
                f"{start_level:g}"
            )
        if spacing == "karras":
            lowest, highest = float(self.log_levels[0].exp()), float(self.log_levels[known - 1].exp())
            if self.variance_preserving and lowest < KARRAS_START < highest:
                highest = KARRAS_START
            levels = karras_levels(count, lowest, highest).flip(0)
            timesteps = self.position(levels)
            alphas, sigmas = self.amplitudes(levels)
            visited: tuple[float, ...] = tuple(timesteps.tolist())
        else:
            chosen = spaced_timesteps(known, count, spacing)
            alphas, sigmas = self.alphas.cpu()[chosen], self.sigmas.cpu()[chosen]
            visited = tuple(chosen)
        clean = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return SamplingSteps(visited, torch.cat([alphas, clean[0]]), torch.cat([sigmas, clean[1]]))


def linear_betas(timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Return linearly growing variances (Ho et al. 2020, section 4).

    ``beta_start`` and ``beta_end`` are stated for 1,000 steps. For other T, they are multiplied by 1000 / T, which
    preserves the total noise (Nichol & Dhariwal 2021). Variances are capped at 0.999.
    """
    scale = 1000.0 / timesteps
    betas = torch.linspace(scale * beta_start, scale * beta_end, timesteps, dtype=torch.float64)
    return betas.clamp(max=MAX_BETA)


def cosine_betas(timesteps: int) -> Tensor:
    """Return variances for a squared signal amplitude that is a squared cosine (Nichol & Dhariwal 2021, eq. 17).

    They are capped at 0.999.
    """
    position = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alphas_bar = torch.cos((position + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).square()
    return (1.0 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=MAX_BETA)


def sigmoid_alphas_bar(timesteps: int) -> Tensor:
    """Return squared signal amplitudes: a sigmoid from -3 to 3 (Jabri et al. 2022; Chen 2023, algorithm 1)."""
    position = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    at_start, at_end = (torch.tensor(end, dtype=torch.float64).sigmoid() for end in (SIGMOID_START, SIGMOID_END))
    here = (position * (SIGMOID_END - SIGMOID_START) + SIGMOID_START).sigmoid()
    return ((at_end - here) / (at_end - at_start)).clamp(min=MIN_ALPHA_BAR)


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Shift and scale the signal amplitudes: the last becomes zero, the first is kept (Lin et al. 2023, alg. 1)."""
    first, last = schedule.alphas[0], schedule.alphas[-1]
    alphas = (schedule.alphas - last) * first / (first - last)
    return NoiseSchedule.from_alphas_bar(alphas.square())


def shifted(schedule: NoiseSchedule, logsnr_shift: float) -> NoiseSchedule:
    """Add ``logsnr_shift`` to the log signal-to-noise ratio at every timestep (Hoogeboom et al. 2023, section 3.1).

    Hoogeboom et al. shift ``-2 ln tan(pi t / 2)``. The cosine schedule here is that of Nichol & Dhariwal 2021, with
    their offset and cap. Its log ratio before the shift is smaller, for T = 1000 by less than 0.1 where ``(t + 1) / T``
    is 0.134 to 0.999, and by 2.8 at the first timestep. At the last one, theirs is minus infinity.
    """
    alphas, sigmas = schedule.amplitudes(schedule.levels * math.exp(-logsnr_shift / 2.0))
    return NoiseSchedule(alphas, sigmas, schedule.variance_preserving)


@dataclass(frozen=True)
class ScheduleRecord:
    """A noise schedule that a user can select.

    Attributes:
        build: returns the schedule of a configuration, before shifting and rescaling.
        help: what it is, and its source.
        variance_preserving: whether ``alpha ** 2 + sigma ** 2 = 1``. Otherwise the schedule is variance exploding: the
            network needs scaled inputs, and knobs that shift or rescale the schedule have no effect.
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
SCHEDULES["cosine"] = ScheduleRecord(_cosine, "squared signal follows a squared cosine (Nichol & Dhariwal 2021)")
SCHEDULES["sigmoid"] = ScheduleRecord(_sigmoid, "squared signal follows a sigmoid (Jabri et al. 2022)")
SCHEDULES["karras"] = ScheduleRecord(
    _karras,
    "variance exploding (Karras et al. 2022); needs diffusion.prediction=edm",
    variance_preserving=False,
)


def build_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """Return the schedule of a configuration."""
    record: ScheduleRecord = SCHEDULES[config.schedule]
    schedule = record.build(config)
    if not record.variance_preserving:
        return schedule
    if config.logsnr_shift:
        schedule = shifted(schedule, config.logsnr_shift)
    return zero_terminal_snr(schedule) if config.zero_terminal_snr else schedule
