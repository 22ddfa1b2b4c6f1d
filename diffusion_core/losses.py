"""The training loss, per sample."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from diffusion_core.denoiser import Denoiser

LossKind = Literal["l2", "l1"]


def diffusion_loss(
    denoiser: Denoiser,
    x0_BCHW: Tensor,
    noise_BCHW: Tensor,
    t_B: Tensor,
    labels_B: Tensor | None,
    kind: LossKind,
) -> Tensor:
    """The simple loss of Ho et al. 2020 (eq. 14): distance between the prediction and its target, mean over pixels.

    Args:
        denoiser: holds the network and says what its target is.
        x0_BCHW: clean images in [-1, 1].
        noise_BCHW: standard normal noise.
        t_B: timesteps, 0..T-1.
        labels_B: classes, ``NO_LABEL`` where the label was dropped, or None.
        kind: ``l2`` (squared) or ``l1`` (absolute) distance.

    Returns:
        Unreduced losses, ``(B,)``, float32.
    """
    x_BCHW = denoiser.schedule.add_noise(x0_BCHW, noise_BCHW, t_B)
    error = denoiser.predict(x_BCHW, t_B, labels_B) - denoiser.target(x0_BCHW, noise_BCHW, t_B)
    return (error.square() if kind == "l2" else error.abs()).mean(dim=(1, 2, 3))
