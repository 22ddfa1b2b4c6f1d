"""Samplers: free functions that turn noise into images by means of a denoiser.

Each has the signature ``(denoiser, x_BCHW, steps, labels_B, *, noise, callback=None) -> x0_BCHW``: ``x_BCHW`` is the
noise at the first of ``steps``, ``noise()`` hands out standard normal noise of its shape, and
``callback(index, x_BCHW, x0_BCHW)`` sees, before each step, the noisy images and the current guess of the clean ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from diffusion_core.config import SampleConfig
from diffusion_core.denoiser import DenoiserFunction
from diffusion_core.schedule import SamplingSteps

NoiseFunction = Callable[[], Tensor]
StepCallback = Callable[[int, Tensor, Tensor], None]


class Sampler(Protocol):
    def __call__(
        self,
        denoiser: DenoiserFunction,
        x_BCHW: Tensor,
        steps: SamplingSteps,
        labels_B: Tensor | None,
        *,
        noise: NoiseFunction,
        callback: StepCallback | None = None,
    ) -> Tensor: ...


def ddpm(
    denoiser: DenoiserFunction,
    x_BCHW: Tensor,
    steps: SamplingSteps,
    labels_B: Tensor | None,
    *,
    noise: NoiseFunction,
    callback: StepCallback | None = None,
    variance: str = "fixed_small",
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), for any subset of the timesteps.

    The mean is that of ``q(x_s | x_t, x0)`` (eq. 7). The variance is the posterior's (``fixed_small``) or that of the
    forward step (``fixed_large``, beta); the last step adds no noise.
    """
    alphas, sigmas = steps.alphas, steps.sigmas
    for index, t in enumerate(steps.timesteps):
        x0_BCHW = denoiser(x_BCHW, x_BCHW.new_full((len(x_BCHW),), t, dtype=torch.long), labels_B)
        if callback is not None:
            callback(index, x_BCHW, x0_BCHW)
        if index == len(steps) - 1:
            return x0_BCHW
        alpha_ratio = alphas[index] / alphas[index + 1]
        forward_variance = sigmas[index] ** 2 - (alpha_ratio * sigmas[index + 1]) ** 2
        posterior_variance = forward_variance * (sigmas[index + 1] / sigmas[index]) ** 2
        mean = (
            float(alpha_ratio * (sigmas[index + 1] / sigmas[index]) ** 2) * x_BCHW
            + float(alphas[index + 1] * forward_variance / sigmas[index] ** 2) * x0_BCHW
        )
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

    ``eta`` 0 is deterministic, 1 is ancestral sampling with the small variance.
    """
    alphas, sigmas = steps.alphas, steps.sigmas
    for index, t in enumerate(steps.timesteps):
        x0_BCHW = denoiser(x_BCHW, x_BCHW.new_full((len(x_BCHW),), t, dtype=torch.long), labels_B)
        if callback is not None:
            callback(index, x_BCHW, x0_BCHW)
        if index == len(steps) - 1:
            return x0_BCHW
        eps_BCHW = (x_BCHW - float(alphas[index]) * x0_BCHW) / float(sigmas[index])
        forward_variance = sigmas[index] ** 2 - (alphas[index] / alphas[index + 1] * sigmas[index + 1]) ** 2
        added = eta * (forward_variance.sqrt() * sigmas[index + 1] / sigmas[index])
        kept = (sigmas[index + 1] ** 2 - added**2).clamp(min=0.0).sqrt()
        x_BCHW = float(alphas[index + 1]) * x0_BCHW + float(kept) * eps_BCHW
        if eta > 0.0:
            x_BCHW = x_BCHW + float(added) * noise()
    return x_BCHW


def build_sampler(config: SampleConfig) -> Sampler:
    """The sampler that a configuration asks for, with its own settings bound."""
    if config.sampler == "ddpm":
        return partial(ddpm, variance=config.variance)
    return partial(ddim, eta=config.eta)
