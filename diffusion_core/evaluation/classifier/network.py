"""The classifier's network: a small residual network with nine layers (Page 2018, "How to train your ResNet").

Axes: B batch, C channels, H height, W width, D features, K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.evaluation.features import Judged

SMALLEST_IMAGE = 8
"""Smallest height and width, in pixels. The network halves both three times."""

LOGIT_SCALE = 0.125
"""Factor of the logits. It keeps logits and gradients small at the start of training (Page 2018)."""


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Return a convolution with batch norm and ReLU, which keeps height and width."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    """Two blocks with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(width, width), block(width, width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the input, ``(B, C, H, W)``, plus the blocks' output."""
        return x_BCHW + self.blocks(x_BCHW)


class ClassifierNetwork(nn.Module):
    """Map images, ``(B, C, H, W)`` float in [-1, 1], of at least 8 pixels, to ``8 * width`` features and class logits.

    Args:
        channels: channels of the images.
        num_classes: number of classes.
        width: channels of the first layer.
    """

    def __init__(self, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.channels, self.num_classes, self.width = channels, num_classes, width
        self.layers = nn.Sequential(
            block(channels, width),
            block(width, 2 * width),
            nn.MaxPool2d(2),
            Residual(2 * width),
            block(2 * width, 4 * width),
            nn.MaxPool2d(2),
            block(4 * width, 8 * width),
            nn.MaxPool2d(2),
            Residual(8 * width),
        )
        self.head = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, x_BCHW: Tensor) -> Judged:
        """Return features, ``(B, D)``, and logits, ``(B, K)``, of images, ``(B, C, H, W)`` in [-1, 1]."""
        maps_BDHW = self.layers(x_BCHW)
        # The same as adaptive pooling, whose backward pass has no deterministic algorithm on a GPU.
        features_BD = F.max_pool2d(maps_BDHW, maps_BDHW.shape[2:]).flatten(1)
        return Judged(features_BD, LOGIT_SCALE * self.head(features_BD))
