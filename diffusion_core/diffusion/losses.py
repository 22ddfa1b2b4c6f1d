"""The training loss of each image.

It is the distance between the network's output and its target, weighted by noise level. With a learned variance, the
variational bound is added.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core.config import DiffusionConfig
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.predictions import SIGMA_DATA
from diffusion_core.diffusion.schedule import NoiseSchedule

HALF_LEVEL = 1.0 / 255.0
"""Half the distance between two uint8 levels in [-1, 1]."""
LEAST_LOG_RATIO = 1e-12
"""Least difference of two logarithms of probabilities that is taken for more than rounding."""


def diffusion_loss(
    denoiser: Denoiser,
    x0_BCHW: Tensor,
    noise_BCHW: Tensor,
    t_B: Tensor,
    labels_B: Tensor | None,
    config: DiffusionConfig,
    shown_B: Tensor | None = None,
) -> Tensor:
    """Return the loss of Ho et al. 2020 (eq. 14), for any distance, weighting and parametrisation.

    Args:
        denoiser: the network, and its training target.
        x0_BCHW: clean images in [-1, 1].
        noise_BCHW: standard normal noise.
        t_B: timesteps, 0..T-1; floats may lie between two timesteps, but not with a learned variance.
        labels_B: classes, ``NO_LABEL`` where the label was dropped, or None.
        config: distance, weighting, and weight of the variational bound.
        shown_B: for self-conditioning, whether the network gets an estimate of the clean image (bool); None: never.

    Returns:
        Unreduced losses, ``(B,)``, float32.
    """
    x_BCHW = denoiser.schedule.add_noise(x0_BCHW, noise_BCHW, t_B)
    estimate_BCHW = shown_estimate(denoiser, x_BCHW, t_B, labels_B, shown_B)
    output, fraction = denoiser.predict(x_BCHW, t_B, labels_B, estimate_BCHW)
    loss_B = distance(output, denoiser.target(x0_BCHW, noise_BCHW, t_B), config) * weight(denoiser, t_B, config)
    if fraction is not None:
        clean = denoiser.clean(output.detach(), x_BCHW, t_B)
        bound_B = variational_bound(denoiser.schedule, x0_BCHW, x_BCHW, clean, fraction, t_B)
        loss_B = loss_B + config.vlb_weight * denoiser.schedule.timesteps * bound_B
    return loss_B


@torch.no_grad()
def shown_estimate(
    denoiser: Denoiser, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None, shown_B: Tensor | None
) -> Tensor | None:
    """Return what a network with self-conditioning is shown in training: its own estimate, or zeros.

    Args:
        denoiser: the network.
        x_BCHW: noisy images.
        t_B: their timesteps.
        labels_B: their classes.
        shown_B: which images get an estimate (bool); None: the network takes none, and the result is None.
    """
    if shown_B is None:
        return None
    first, _ = denoiser.predict(x_BCHW, t_B, labels_B)
    return denoiser.clean(first, x_BCHW, t_B).clamp(-1.0, 1.0) * shown_B[:, None, None, None]


@torch.no_grad()
def noise_error(
    denoiser: Denoiser,
    x0_BCHW: Tensor,
    noise_BCHW: Tensor,
    t_B: Tensor,
    labels_B: Tensor | None,
    shown_B: Tensor | None = None,
) -> Tensor:
    """Return the mean squared error of the noise that the network's output implies, ``(B,)``, float32.

    This is the loss of Ho et al. 2020 (eq. 14) for every parametrisation, without weights. For the arguments, see
    :func:`diffusion_loss`. From pure noise it is 0, whatever the network predicts, as the input is the noise.
    """
    x_BCHW = denoiser.schedule.add_noise(x0_BCHW, noise_BCHW, t_B)
    estimate_BCHW = shown_estimate(denoiser, x_BCHW, t_B, labels_B, shown_B)
    output, _ = denoiser.predict(x_BCHW, t_B, labels_B, estimate_BCHW)
    errors_B = (output - denoiser.target(x0_BCHW, noise_BCHW, t_B)).square().mean(dim=(1, 2, 3))
    # The error of the noise is that of the clean image times the signal-to-noise ratio.
    return errors_B * denoiser.snr(t_B) / denoiser.error_scale(t_B)


def distance(output_BCHW: Tensor, target_BCHW: Tensor, config: DiffusionConfig) -> Tensor:
    """Return the mean distance over the pixels of each image, ``(B,)``: squared (l2), absolute (l1), or huber.

    huber is squared up to ``huber_delta`` and linear beyond. It is twice torch's ``huber_loss``, so that it equals l2
    for small errors.
    """
    if config.loss == "l2":
        each = F.mse_loss(output_BCHW, target_BCHW, reduction="none")
    elif config.loss == "l1":
        each = F.l1_loss(output_BCHW, target_BCHW, reduction="none")
    else:
        each = 2.0 * F.huber_loss(output_BCHW, target_BCHW, reduction="none", delta=config.huber_delta)
    return each.mean(dim=(1, 2, 3))


def weight(denoiser: Denoiser, t_B: Tensor, config: DiffusionConfig) -> Tensor:
    """Return the weight of each image's distance, ``(B,)``.

    Weightings are defined for the squared error of the clean image. Dividing by :meth:`Denoiser.error_scale` makes them
    equivalent for every parametrisation. ``uniform`` is 1 for every parametrisation.

    From pure noise (``diffusion.zero_terminal_snr``), min-SNR and P2 would be 0, so that the last timestep, where
    sampling starts, would never be learned. There, the error of the clean image, which is that of v, has weight 1, as
    every timestep has in the v loss of Lin et al. 2023 (section 3.2).
    """
    if config.weighting == "uniform":
        return torch.ones(len(t_B), device=t_B.device)
    snr_B = denoiser.snr(t_B)
    if config.weighting == "edm":  # Karras et al. 2022, table 1: (level^2 + sigma_data^2) / (level * sigma_data)^2.
        return (1.0 / SIGMA_DATA**2 + snr_B) / denoiser.error_scale(t_B)
    if config.weighting == "min_snr":  # Hang et al. 2023, eq. 6.
        wanted_B = snr_B.clamp(max=config.min_snr_gamma)
    else:  # Choi et al. 2022, eq. 8, with k = 1; they weigh the error of eps.
        wanted_B = snr_B / (1.0 + snr_B) ** config.p2_gamma
    return torch.where(snr_B > 0.0, wanted_B, 1.0) / denoiser.error_scale(t_B)


def variational_bound(
    schedule: NoiseSchedule,
    x0_BCHW: Tensor,
    x_BCHW: Tensor,
    clean_BCHW: Tensor,
    fraction_BCHW: Tensor,
    t_B: Tensor,
) -> Tensor:
    """Return one term of the variational bound (Ho et al. 2020, eq. 5), in bits per pixel and channel, ``(B,)``.

    For t > 0, it is the Kullback-Leibler divergence KL(posterior || reverse step). For t = 0, it is the negative
    log-likelihood of the discretised image. The fraction interpolates the log variance of the reverse step between
    those of the posterior (0) and of the forward step (1), as in Nichol & Dhariwal 2021, eq. 15.

    Args:
        schedule: a variance preserving schedule.
        x0_BCHW: clean images in [-1, 1].
        x_BCHW: noisy images at ``t_B``.
        clean_BCHW: the network's estimate of the clean images.
        fraction_BCHW: the fraction, in [0, 1].
        t_B: integer timesteps, 0..T-1.
    """
    mean_true, low = posterior(schedule, x0_BCHW, x_BCHW, t_B)
    mean, _ = posterior(schedule, clean_BCHW, x_BCHW, t_B)
    high = forward_log_variance(schedule, t_B, x_BCHW)
    log_variance = low + fraction_BCHW * (high - low)
    divergence = 0.5 * (log_variance - low + (low - log_variance).exp() - 1.0)
    divergence = divergence + 0.5 * (mean_true - mean).square() * (-log_variance).exp()
    first_B = t_B == 0
    likelihood = discretised_log_likelihood(x0_BCHW, mean, 0.5 * log_variance)
    bound_BCHW = torch.where(first_B[:, None, None, None], -likelihood, divergence)
    return bound_BCHW.mean(dim=(1, 2, 3)) / math.log(2.0)


def posterior(schedule: NoiseSchedule, x0_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the log variance of ``q(x_{t-1} | x_t, x_0)`` (Ho et al. 2020, eq. 6 and 7).

    At t = 0 the variance is zero. The variance at t = 1 replaces it, as in Nichol & Dhariwal 2021.
    """
    alpha, sigma, alpha_before, sigma_before, step = _one_step(schedule, t_B, x_BCHW)
    mean = (alpha / alpha_before) * (sigma_before / sigma) ** 2 * x_BCHW + alpha_before * step / sigma**2 * x0_BCHW
    _, sigma1, _, sigma0, step1 = _one_step(schedule, t_B.clamp(min=1), x_BCHW)
    return mean.float(), (step1 * (sigma0 / sigma1) ** 2).log().float()


def forward_log_variance(schedule: NoiseSchedule, t_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """Return the log variance of the forward step to t (beta), shaped to broadcast against images."""
    return _one_step(schedule, t_B, like_BCHW)[-1].log().float()


def _one_step(schedule: NoiseSchedule, t_B: Tensor, like_BCHW: Tensor) -> tuple[Tensor, ...]:
    """Return alpha and sigma at t and at t - 1, and the variance added in between; float64, broadcasting."""
    shape = (-1,) + (1,) * (like_BCHW.ndim - 1)
    alphas = torch.cat([torch.ones_like(schedule.alphas[:1]), schedule.alphas])
    sigmas = torch.cat([torch.zeros_like(schedule.sigmas[:1]), schedule.sigmas])
    now = t_B.to(alphas.device) + 1
    alpha, sigma, alpha_before, sigma_before = (
        part.to(like_BCHW.device).view(shape) for part in (alphas[now], sigmas[now], alphas[now - 1], sigmas[now - 1])
    )
    return alpha, sigma, alpha_before, sigma_before, sigma**2 - (alpha / alpha_before * sigma_before) ** 2


def discretised_log_likelihood(x0_BCHW: Tensor, mean_BCHW: Tensor, log_std_BCHW: Tensor) -> Tensor:
    """Return the log-likelihood of uint8 levels under normal distributions (Ho et al. 2020, eq. 13), in nats.

    It is computed from logarithms of the cumulative distribution, in float64, so that it has a value and a gradient at
    any distance from the mean. The result has the type of the means.
    """
    scale = (-log_std_BCHW.double()).exp()
    away = (x0_BCHW.double() - mean_BCHW.double()) * scale
    half = HALF_LEVEL * scale
    # By symmetry: the mass between the two bounds is that between their negatives. Left of the mean, both are small.
    near, far = half - away.abs(), -half - away.abs()
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    between = log_near + (-torch.expm1((log_far - log_near).clamp(max=-LEAST_LOG_RATIO))).log()
    between = torch.where(x0_BCHW > 0.999, torch.special.log_ndtr(half - away), between)
    between = torch.where(x0_BCHW < -0.999, torch.special.log_ndtr(half + away), between)
    return between.to(mean_BCHW.dtype)
