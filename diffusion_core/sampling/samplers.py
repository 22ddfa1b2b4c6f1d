"""Samplers: functions that turn noise into images with a denoiser.

Their signature is ``(denoiser, x_BCHW, steps, labels_B, *, noise, callback=None) -> x0_BCHW``. ``x_BCHW`` is the noise
at the first of ``steps``: standard normal, times sigma in a variance exploding schedule. ``noise()`` returns standard
normal noise of the same shape. ``callback(index, x_BCHW, x0_BCHW)`` is called before each step with the noisy images
and the current estimate of the clean images.

With ``x = alpha * x0 + sigma * eps`` and the noise level ``s = sigma / alpha``, the probability flow ODE of Karras et
al. 2022 (eq. 1, with their scaling) is ``d(x / alpha) / ds = eps``. The samplers of that paper integrate ``x / alpha``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from diffusion_core.config import SampleConfig
from diffusion_core.diffusion.denoiser import Denoiser, DenoiserFunction
from diffusion_core.diffusion.sampling_steps import SamplingSteps
from diffusion_core.diffusion.schedule import PURE_NOISE_LEVEL, NoiseSchedule
from diffusion_core.registries import SAMPLERS

NoiseFunction = Callable[[], Tensor]
StepCallback = Callable[[int, Tensor, Tensor], None]


class Sampler(Protocol):
    """Signature of all samplers: from noise, ``(B, C, H, W)``, to images in [-1, 1]."""

    def __call__(
        self,
        denoiser: DenoiserFunction,
        x_BCHW: Tensor,
        steps: SamplingSteps,
        labels_B: Tensor | None,
        *,
        noise: NoiseFunction,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Sample images. See each sampler for its settings."""


def ddpm(
    denoiser: DenoiserFunction,
    x_BCHW: Tensor,
    steps: SamplingSteps,
    labels_B: Tensor | None,
    *,
    noise: NoiseFunction,
    callback: StepCallback | None = None,
    variance: str = "fixed_small",
    fraction: Callable[[], Tensor | None] | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), for any subset of the timesteps.

    The mean is that of ``q(x_s | x_t, x0)`` (eq. 7). The variance is that of the posterior (``fixed_small``), that of
    the forward step (``fixed_large``, beta), or interpolated between their logarithms with the network's ``fraction``
    (``learned``; Nichol & Dhariwal 2021, eq. 15). The last step adds no noise.
    """
    alphas, sigmas = steps.alphas, steps.sigmas
    for index in range(len(steps)):
        x0_BCHW = denoiser(x_BCHW, steps.t(index, x_BCHW), labels_B)
        if callback is not None:
            callback(index, x_BCHW, x0_BCHW)
        if index == len(steps) - 1:
            return x0_BCHW
        alpha_ratio = alphas[index] / alphas[index + 1]
        sigma_ratio = sigmas[index + 1] / sigmas[index]
        forward_variance = sigmas[index] ** 2 - (alpha_ratio * sigmas[index + 1]) ** 2
        posterior_variance = forward_variance * sigma_ratio**2
        mean = (
            float(alpha_ratio * sigma_ratio**2) * x_BCHW
            + float(alphas[index + 1] * forward_variance / sigmas[index] ** 2) * x0_BCHW
        )
        if variance == "learned":
            assert fraction is not None
            between = fraction()
            assert between is not None
            # Guidance doubles the network's batch; the first half has the labels.
            between = between[: len(x_BCHW)]
            low, high = 0.5 * math.log(posterior_variance), 0.5 * math.log(forward_variance)
            x_BCHW = mean + (low + (high - low) * between).exp() * noise()
        else:
            added = posterior_variance if variance == "fixed_small" else forward_variance
            x_BCHW = mean + float(added.sqrt()) * noise()
    return x_BCHW


def ddim(
    denoiser: DenoiserFunction,
    x_BCHW: Tensor,
    steps: SamplingSteps,
    labels_B: Tensor | None,
    *,
    noise: NoiseFunction,
    callback: StepCallback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    ``eta`` 0 is deterministic and equals :func:`euler`; 1 is ancestral sampling with the small variance.
    """
    alphas, sigmas = steps.alphas, steps.sigmas
    for index in range(len(steps)):
        x0_BCHW = denoiser(x_BCHW, steps.t(index, x_BCHW), labels_B)
        if callback is not None:
            callback(index, x_BCHW, x0_BCHW)
        if index == len(steps) - 1:
            return x0_BCHW
        eps_BCHW = noise_in(x_BCHW, x0_BCHW, steps, index)
        forward_variance = sigmas[index] ** 2 - (alphas[index] / alphas[index + 1] * sigmas[index + 1]) ** 2
        added = eta * (forward_variance.sqrt() * sigmas[index + 1] / sigmas[index])
        kept = (sigmas[index + 1] ** 2 - added**2).clamp(min=0.0).sqrt()
        x_BCHW = float(alphas[index + 1]) * x0_BCHW + float(kept) * eps_BCHW
        if eta > 0.0:
            x_BCHW = x_BCHW + float(added) * noise()
    return x_BCHW


def euler(
    denoiser: DenoiserFunction,
    x_BCHW: Tensor,
    steps: SamplingSteps,
    labels_B: Tensor | None,
    *,
    noise: NoiseFunction,
    callback: StepCallback | None = None,
) -> Tensor:
    """Euler's method on the probability flow ODE (Karras et al. 2022, algorithm 1 without its correction)."""
    for index in range(len(steps)):
        x0_BCHW = denoiser(x_BCHW, steps.t(index, x_BCHW), labels_B)
        if callback is not None:
            callback(index, x_BCHW, x0_BCHW)
        eps_BCHW = noise_in(x_BCHW, x0_BCHW, steps, index)
        x_BCHW = float(steps.alphas[index + 1]) * x0_BCHW + float(steps.sigmas[index + 1]) * eps_BCHW
    return x_BCHW


def euler_ancestral(
    denoiser: DenoiserFunction,
    x_BCHW: Tensor,
    steps: SamplingSteps,
    labels_B: Tensor | None,
    *,
    noise: NoiseFunction,
    callback: StepCallback | None = None,
) -> Tensor:
    """Take Euler steps beyond the next noise level, and add noise up to it (k-diffusion's ancestral sampling)."""
    for index in range(len(steps)):
        x0_BCHW = denoiser(x_BCHW, steps.t(index, x_BCHW), labels_B)
        if callback is not None:
            callback(index, x_BCHW, x0_BCHW)
        if index == len(steps) - 1:
            return x0_BCHW
        now, after = steps.levels[index], steps.levels[index + 1]
        up = after * math.sqrt(1.0 - (after / now) ** 2)
        down = after**2 / now
        eps_BCHW = noise_in(x_BCHW, x0_BCHW, steps, index)
        x_BCHW = float(steps.alphas[index + 1]) * (x0_BCHW + down * eps_BCHW + up * noise())
    return x_BCHW


def heun(
    denoiser: DenoiserFunction,
    x_BCHW: Tensor,
    steps: SamplingSteps,
    labels_B: Tensor | None,
    *,
    noise: NoiseFunction,
    callback: StepCallback | None = None,
) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): two evaluations per step, one at the last step.

    Steps from pure noise (``PURE_NOISE_LEVEL``) are Euler steps. There the slope is known exactly, and an error of the
    correction would be multiplied by a huge (cosine schedule) or infinite (zero terminal SNR) noise level.
    """
    for index in range(len(steps)):
        x0_BCHW = denoiser(x_BCHW, steps.t(index, x_BCHW), labels_B)
        if callback is not None:
            callback(index, x_BCHW, x0_BCHW)
        eps_BCHW = noise_in(x_BCHW, x0_BCHW, steps, index)
        alpha, sigma = float(steps.alphas[index + 1]), float(steps.sigmas[index + 1])
        ahead_BCHW = alpha * x0_BCHW + sigma * eps_BCHW
        if is_corrected(steps, index):
            now, after = steps.levels[index], steps.levels[index + 1]
            x0_ahead_BCHW = denoiser(ahead_BCHW, steps.t(index + 1, x_BCHW), labels_B)
            eps_ahead_BCHW = noise_in(ahead_BCHW, x0_ahead_BCHW, steps, index + 1)
            slope_BCHW = 0.5 * (eps_BCHW + eps_ahead_BCHW)
            ahead_BCHW = alpha * (x0_BCHW + now * eps_BCHW + (after - now) * slope_BCHW)
        x_BCHW = ahead_BCHW
    return x_BCHW


def heun_evaluations(steps: SamplingSteps) -> int:
    """Return the number of evaluations of the denoiser per image in Heun's method."""
    return len(steps) + sum(is_corrected(steps, index) for index in range(len(steps)))


def is_corrected(steps: SamplingSteps, index: int) -> bool:
    """Return whether Heun's method evaluates the denoiser a second time at a step."""
    return steps.levels[index + 1] > 0.0 and steps.levels[index] < PURE_NOISE_LEVEL


def dpmpp_2m(
    denoiser: DenoiserFunction,
    x_BCHW: Tensor,
    steps: SamplingSteps,
    labels_B: Tensor | None,
    *,
    noise: NoiseFunction,
    callback: StepCallback | None = None,
    stochastic: bool = False,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), and its SDE variant (their eq. 19, midpoint).

    Steps are of second order, from the last two estimates of the clean image. They are of first order at the start, and
    where the logarithm of a noise level is infinite.
    """
    x0_before_BCHW, h_before = None, math.inf
    for index in range(len(steps)):
        x0_BCHW = denoiser(x_BCHW, steps.t(index, x_BCHW), labels_B)
        if callback is not None:
            callback(index, x_BCHW, x0_BCHW)
        if index == len(steps) - 1:
            return x0_BCHW
        now, after = steps.levels[index], steps.levels[index + 1]
        h = math.log(now / after) if math.isfinite(now) else math.inf
        alpha, sigma_ratio = float(steps.alphas[index + 1]), float(steps.sigmas[index + 1] / steps.sigmas[index])
        best_BCHW = x0_BCHW
        if x0_before_BCHW is not None and math.isfinite(h_before):
            best_BCHW = x0_BCHW + 0.5 * h / h_before * (x0_BCHW - x0_before_BCHW)
        if stochastic:
            grown = -math.expm1(-2.0 * h)
            x_BCHW = sigma_ratio * math.exp(-h) * x_BCHW + alpha * grown * best_BCHW
            x_BCHW = x_BCHW + float(steps.sigmas[index + 1]) * math.sqrt(grown) * noise()
        else:
            x_BCHW = sigma_ratio * x_BCHW - alpha * math.expm1(-h) * best_BCHW
        x0_before_BCHW, h_before = x0_BCHW, h
    return x_BCHW


def consistency(
    denoiser: DenoiserFunction,
    x_BCHW: Tensor,
    steps: SamplingSteps,
    labels_B: Tensor | None,
    *,
    noise: NoiseFunction,
    callback: StepCallback | None = None,
) -> Tensor:
    """Multi-step consistency sampling (Song et al. 2023, algorithm 1, with epsilon 0), for consistency students.

    The denoiser's clean images are the images. Each further step adds fresh noise to them and improves them.
    """
    x0_BCHW = x_BCHW
    for index in range(len(steps)):
        if index:
            x_BCHW = float(steps.alphas[index]) * x0_BCHW + float(steps.sigmas[index]) * noise()
        x0_BCHW = denoiser(x_BCHW, steps.t(index, x_BCHW), labels_B)
        if callback is not None:
            callback(index, x_BCHW, x0_BCHW)
    return x0_BCHW


def noise_in(x_BCHW: Tensor, x0_BCHW: Tensor, steps: SamplingSteps, index: int) -> Tensor:
    """Return the noise eps in noisy images, given the clean images."""
    return (x_BCHW - float(steps.alphas[index]) * x0_BCHW) / float(steps.sigmas[index])


@dataclass(frozen=True)
class SamplerRecord:
    """A sampler that a user can select.

    Attributes:
        function: the sampler.
        help: what it does, and its source.
        settings: returns further keyword arguments of the function, from the knobs and the innermost denoiser, which
            may be None if its variance is not needed.
        evaluations: returns the number of evaluations of the denoiser per image.
    """

    function: Callable[..., Tensor]
    help: str
    settings: Callable[[SampleConfig, Denoiser | None], dict[str, Any]] = lambda _config, _denoiser: {}
    evaluations: Callable[[SamplingSteps], int] = len


def _ddpm_settings(config: SampleConfig, denoiser: Denoiser | None) -> dict[str, Any]:
    fraction = None if denoiser is None else lambda: denoiser.fraction_BCHW
    return {"variance": config.variance, "fraction": fraction}


SAMPLERS["ddpm"] = SamplerRecord(ddpm, "ancestral sampling (Ho et al. 2020)", _ddpm_settings)
SAMPLERS["ddim"] = SamplerRecord(
    ddim, "deterministic, or with noise scaled by sample.eta (Song et al. 2021)", lambda config, _: {"eta": config.eta}
)
SAMPLERS["euler"] = SamplerRecord(euler, "Euler's method on the probability flow ODE (Karras et al. 2022)")
SAMPLERS["euler_ancestral"] = SamplerRecord(euler_ancestral, "Euler steps with fresh noise after each (k-diffusion)")
SAMPLERS["heun"] = SamplerRecord(
    heun, "second order, two evaluations per step (Karras et al. 2022)", evaluations=heun_evaluations
)
SAMPLERS["dpmpp_2m"] = SamplerRecord(
    dpmpp_2m, "DPM-Solver++(2M), second order, one evaluation per step (Lu et al. 2022)"
)
SAMPLERS["dpmpp_2m_sde"] = SamplerRecord(
    dpmpp_2m, "DPM-Solver++(2M) with fresh noise at every step (Lu et al. 2022)", lambda *_: {"stochastic": True}
)

SAMPLERS["consistency"] = SamplerRecord(
    consistency, "clean images with fresh noise between steps, for consistency students (Song et al. 2023)"
)


def start_scale(schedule: NoiseSchedule, steps: SamplingSteps) -> float:
    """Return the factor of the noise that sampling starts from.

    With a variance preserving schedule, it starts at unit variance, even if some signal is left at T-1.
    """
    return 1.0 if schedule.variance_preserving else float(steps.sigmas[0])


def steps_of(config: SampleConfig, schedule: NoiseSchedule) -> SamplingSteps:
    """Return the timesteps that a configuration visits."""
    return schedule.steps(config.steps, config.spacing, config.start_level)


def evaluations(config: SampleConfig, schedule: NoiseSchedule) -> int:
    """Return the number of evaluations of the denoiser per image."""
    record: SamplerRecord = SAMPLERS[config.sampler]
    return record.evaluations(steps_of(config, schedule))


def build_sampler(config: SampleConfig, denoiser: Denoiser | None = None) -> Sampler:
    """Return the configured sampler, with its settings bound.

    Args:
        config: the configuration.
        denoiser: the innermost denoiser, which provides a learned variance.
    """
    record: SamplerRecord = SAMPLERS[config.sampler]
    return partial(record.function, **record.settings(config, denoiser))
