"""Condition a network on a small image, so that it upsamples (Ho et al. 2021, Cascaded Diffusion Models).

Noise is added to the small image, which is enlarged and concatenated to the noisy image, with the level of that noise.
Axes: B batch, C channels, H height, W width, h and w those of the small image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lowered(x_BCHW: Tensor, factor: int) -> Tensor:
    """Return images at 1/factor of their size, ``(B, C, H/factor, W/factor)``: the mean of each block of pixels.

    Args:
        x_BCHW: float images, whose height and width are multiples of the factor.
        factor: pixels of a block along each side.
    """
    return F.avg_pool2d(x_BCHW, factor)


def raised(low_BChw: Tensor, size: int) -> Tensor:
    """Return small float images at full size, ``(B, C, size, size)``, by bilinear interpolation."""
    return F.interpolate(low_BChw, size=(size, size), mode="bilinear", align_corners=False)


def given(low_BChw: Tensor, level_B: Tensor, noise_BChw: Tensor, size: int) -> Tensor:
    """Return what the network is given beside the noisy image, ``(B, C + 1, size, size)`` float32.

    These are the channels of the small image with noise, ``sqrt(1 - level^2) low + level noise`` (the variance
    preserving augmentation of Ho et al. 2021, section 4.2), enlarged, and one channel that holds the level everywhere.

    Args:
        low_BChw: small images in [-1, 1].
        level_B: levels of noise, in [0, 1].
        noise_BChw: standard normal noise.
        size: height and width of the result in pixels.
    """
    level_B111 = level_B.float().view(-1, 1, 1, 1)
    noisy_BChw = (1.0 - level_B111.square()).sqrt() * low_BChw + level_B111 * noise_BChw
    return torch.cat([raised(noisy_BChw, size), level_B111.expand(-1, 1, size, size)], dim=1)
