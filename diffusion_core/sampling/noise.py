"""The noise of images that are sampled together. Each has a random stream of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffusion_core.randomness import Purpose, streams


class Numbered(Protocol):
    """What names the random stream of an image: a request."""

    @property
    def label(self) -> int:
        """Its class."""

    @property
    def index(self) -> int:
        """Its number among the images of that class."""


class ImageNoise:
    """Standard normal noise with one stream per image, so that an image does not depend on its batch.

    Args:
        wanted: the images. Seed, label and index determine the random stream of each.
        seed: the seed of the run or of the user.
        shape_CHW: shape of an image.
        device: device of the result.
        draws: version of the random draws. The processor draws version 1 for every device, so that it is the same.
        purpose: what the noise is for.
        stage: further integers that name the streams; none: those of a model that does not upsample.
    """

    def __init__(
        self,
        wanted: Sequence[Numbered],
        seed: int,
        shape_CHW: tuple[int, int, int],
        device: torch.device,
        draws: int = 2,
        purpose: Purpose = Purpose.SAMPLE,
        stage: Sequence[int] = (),
    ) -> None:
        keys = [(seed, purpose, image.label, image.index, *stage) for image in wanted]
        self.streams = streams(draws, keys, device if draws > 1 else "cpu")
        self.shape_CHW = shape_CHW
        self.device = device

    def __call__(self) -> Tensor:
        """Return the next noise of every image, ``(B, C, H, W)`` float32."""
        return self.streams.normal(*self.shape_CHW).to(self.device, non_blocking=True)
