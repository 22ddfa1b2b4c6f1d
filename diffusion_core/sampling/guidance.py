"""Guidance. It wraps a denoiser and keeps its signature, so that it works with every sampler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_core.diffusion.denoiser import DenoiserFunction
from diffusion_core.diffusion.sampling_steps import SamplingSteps
from diffusion_core.diffusion.schedule import NoiseSchedule
from diffusion_core.model.unet import NO_LABEL


def guided(
    denoiser: DenoiserFunction,
    scale: float,
    *,
    reference: DenoiserFunction | None = None,
    applies: Callable[[Tensor], Tensor] | None = None,
    known: Callable[[Tensor], bool | None] | None = None,
) -> DenoiserFunction:
    """Return a guided denoiser: ``x0 = x0_reference + scale * (x0 - x0_reference)``.

    Without a ``reference``, this is classifier-free guidance (Ho & Salimans 2022), whose reference is the same network
    without labels. ``scale`` 1 is the conditional model, and 0 the unconditional model; above 1, the label has more
    weight. (The paper's w is ``scale - 1``.) Both are evaluated as one batch. With a ``reference``, which is a weaker
    model with the same labels, this is autoguidance (Karras et al. 2024). Because it is linear in x0, guiding eps is
    equivalent.

    Args:
        denoiser: the denoiser to guide.
        scale: weight of the denoiser relative to the reference.
        reference: the denoiser to guide away from; None: the same denoiser without labels.
        applies: maps timesteps, ``(B,)``, to bool, ``(B,)``: whether to guide. None: always.
        known: tells whether to guide a whole batch, from :func:`decided`; None where it does not know. There, and
            without it, both are evaluated, and ``applies`` chooses image by image: to leave out the guidance, the
            timesteps would have to be read, which waits for a GPU.
    """
    if scale == 1.0:
        return denoiser

    def both(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> tuple[Tensor, Tensor]:
        if reference is not None:
            return denoiser(x_BCHW, t_B, labels_B), reference(x_BCHW, t_B, labels_B)
        assert labels_B is not None
        labels = torch.cat([labels_B, torch.full_like(labels_B, NO_LABEL)])
        # Not chunk: torch.export would fix the size of the batch.
        with_label, without = denoiser(x_BCHW.repeat(2, 1, 1, 1), t_B.repeat(2), labels).unflatten(0, (2, -1))
        return with_label, without

    def guided_denoiser(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        if reference is None and (labels_B is None or (scale == 0.0 and applies is None)):
            return denoiser(x_BCHW, t_B, None)
        guide = applies is None or (None if known is None else known(t_B))
        if guide is False:
            return denoiser(x_BCHW, t_B, labels_B)
        x0_BCHW, reference_BCHW = both(x_BCHW, t_B, labels_B)
        result = reference_BCHW + scale * (x0_BCHW - reference_BCHW)
        if guide or applies is None:
            return result
        return torch.where(applies(t_B)[:, None, None, None], result, x0_BCHW)

    return guided_denoiser


def decided(applies: Callable[[Tensor], Tensor], steps: SamplingSteps) -> Callable[[Tensor], bool | None]:
    """Decide which steps of a sampler are guided before it starts, so that no step waits for a GPU to tell.

    Args:
        applies: maps timesteps on the processor to whether they are guided.
        steps: the steps of the sampler.

    Returns:
        A function that recognises the timesteps which ``steps.t`` returned. For others it returns None.
    """
    guided_S: list[bool] = applies(steps.t_S).tolist()

    def known(t_B: Tensor) -> bool | None:
        index = steps.index_of(t_B)
        return None if index is None else guided_S[index]

    return known


def between_levels(schedule: NoiseSchedule, low: float, high: float) -> Callable[[Tensor], Tensor]:
    """Return a function that tells whether the noise level ``sigma / alpha`` at timesteps is in (low, high].

    See Kynkaanniemi et al. 2024.
    """

    def applies(t_B: Tensor) -> Tensor:
        alpha, sigma = schedule.at(t_B, t_B[:, None].float())
        level_B = (sigma / alpha).flatten()
        return (level_B > low) & (level_B <= high)

    return applies
