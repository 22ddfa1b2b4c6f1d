"""Guidance wraps a denoiser and keeps its signature, so that no sampler needs to know of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_core.diffusion.denoiser import DenoiserFunction
from diffusion_core.diffusion.schedule import NoiseSchedule
from diffusion_core.model.unet import NO_LABEL


def guided(
    denoiser: DenoiserFunction,
    scale: float,
    *,
    reference: DenoiserFunction | None = None,
    applies: Callable[[Tensor], Tensor] | None = None,
) -> DenoiserFunction:
    """Guidance: ``x0 = x0_reference + scale * (x0 - x0_reference)``.

    Without a ``reference`` this is classifier-free guidance (Ho & Salimans 2022), whose reference is the same network
    without the label: ``scale`` 1 is the plain conditional model, 0 the unconditional one; above 1 the label weighs
    more. (The paper's w is ``scale - 1``.) Both run as one batch. With a ``reference``, a weaker model that is
    given the same labels, it is autoguidance (Karras et al. 2024). Linear in x0, so the same as guiding eps.

    Args:
        denoiser: what is guided.
        scale: how far beyond the reference.
        reference: what it is guided away from; None: itself, without labels.
        applies: says for which timesteps, ``(B,)`` to bool ``(B,)``; elsewhere the denoiser is left alone. None: all.
    """
    if scale == 1.0:
        return denoiser

    def both(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> tuple[Tensor, Tensor]:
        if reference is not None:
            return denoiser(x_BCHW, t_B, labels_B), reference(x_BCHW, t_B, labels_B)
        assert labels_B is not None
        labels = torch.cat([labels_B, torch.full_like(labels_B, NO_LABEL)])
        with_label, without = denoiser(x_BCHW.repeat(2, 1, 1, 1), t_B.repeat(2), labels).chunk(2)
        return with_label, without

    def guided_denoiser(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        if reference is None and (labels_B is None or (scale == 0.0 and applies is None)):
            return denoiser(x_BCHW, t_B, None)
        guided_B = None if applies is None else applies(t_B)
        if guided_B is not None and not guided_B.any():
            return denoiser(x_BCHW, t_B, labels_B)
        x0_BCHW, reference_BCHW = both(x_BCHW, t_B, labels_B)
        result = reference_BCHW + scale * (x0_BCHW - reference_BCHW)
        return result if guided_B is None else torch.where(guided_B[:, None, None, None], result, x0_BCHW)

    return guided_denoiser


def between_levels(schedule: NoiseSchedule, low: float, high: float) -> Callable[[Tensor], Tensor]:
    """Whether the noise level ``sigma / alpha`` at timesteps lies in (low, high] (Kynkaanniemi et al. 2024)."""

    def applies(t_B: Tensor) -> Tensor:
        alpha, sigma = schedule.at(t_B, t_B[:, None].float())
        level_B = (sigma / alpha).flatten()
        return (level_B > low) & (level_B <= high)

    return applies
