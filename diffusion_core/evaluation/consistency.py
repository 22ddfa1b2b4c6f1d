"""How alike the images of two models are, image by image: structural similarity and mean squared difference.

Axes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
"""Size and width of the Gaussian window of Wang et al. 2004; on images smaller than it, it is cut to their size."""

K1, K2 = 0.01, 0.03
RANGE = 255.0


def structural_similarity(one_BCHW: Tensor, two_BCHW: Tensor) -> Tensor:
    """Mean structural similarity (Wang et al. 2004, eq. 13), averaged over channels, ``(B,)`` in [-1, 1]; 1: equal.

    Args:
        one_BCHW, two_BCHW: uint8 images of equal shape.
    """
    _check(one_BCHW, two_BCHW)
    x, y = (images.double().flatten(0, 1)[:, None] for images in (one_BCHW, two_BCHW))
    height, width = one_BCHW.shape[2:]
    window = torch.outer(_gaussian(height), _gaussian(width))[None, None].to(x.device)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window)

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    alike = alike / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return alike.mean((1, 2, 3)).view(one_BCHW.shape[:2]).mean(1)


def mean_squared_difference(one_BCHW: Tensor, two_BCHW: Tensor) -> Tensor:
    """Mean squared difference of uint8 images, on the scale [-1, 1] of the core, ``(B,)``."""
    _check(one_BCHW, two_BCHW)
    difference = (one_BCHW.double() - two_BCHW.double()) / (RANGE / 2.0)
    return difference.square().mean((1, 2, 3))


def _check(one_BCHW: Tensor, two_BCHW: Tensor) -> None:
    if one_BCHW.shape != two_BCHW.shape:
        raise ValueError(
            f"images of {tuple(one_BCHW.shape)} and {tuple(two_BCHW.shape)} cannot be compared one by one; expected "
            f"equal shapes"
        )


def _gaussian(length: int) -> Tensor:
    size = min(WINDOW, length - (length + 1) % 2)  # Odd, so that it has a middle.
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-0.5 * (offset / SIGMA) ** 2)
    return weights / weights.sum()
