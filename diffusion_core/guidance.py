"""Guidance wraps a denoiser and keeps its signature, so that no sampler needs to know of it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_core.denoiser import DenoiserFunction
from diffusion_core.unet import NO_LABEL


def guided(denoiser: DenoiserFunction, scale: float) -> DenoiserFunction:
    """Classifier-free guidance (Ho & Salimans 2022): ``x0 = x0(no label) + scale * (x0(label) - x0(no label))``.

    ``scale`` 1 is the plain conditional model, 0 the unconditional one; above 1 the label weighs more. (The paper's
    w is ``scale - 1``.) Linear in x0, so the same as guiding eps. Both branches run as one batch.
    """
    if scale == 1.0:
        return denoiser

    def guided_denoiser(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        if labels_B is None or scale == 0.0:
            return denoiser(x_BCHW, t_B, None)
        labels = torch.cat([labels_B, torch.full_like(labels_B, NO_LABEL)])
        with_label, without = denoiser(x_BCHW.repeat(2, 1, 1, 1), t_B.repeat(2), labels).chunk(2)
        return without + scale * (with_label - without)

    return guided_denoiser
