"""The small images that a model upsamples: held-out images of its data set, lowered, or stored ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_core.config import UpsampleConfig
from diffusion_core.data.datasets import DataError, Dataset, to_uint8, to_unit
from diffusion_core.diffusion.upsampling import lowered, raised
from diffusion_core.files import sha256
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.sampling.generation import Lows, Request


class HeldOut:
    """Held-out images at 1/factor of their size. A request takes the image of its index among those of its class.

    After the last one, the first one follows again. A request without a label takes any class.

    Args:
        dataset: the images.
        factor: the factor of upsampling.

    Raises:
        DataError: if a class has no held-out image.
    """

    def __init__(self, dataset: Dataset, factor: int) -> None:
        self.images_NCHW = dataset.val.images_NCHW
        self.factor = factor
        labels_N = dataset.val.labels_N.cpu()
        self._places = {label: (labels_N == label).nonzero()[:, 0] for label in range(dataset.num_classes)}
        self._places[NO_LABEL] = torch.arange(len(labels_N))
        for label, name in enumerate(dataset.class_names):
            if not len(self._places[label]):
                raise DataError(f"class {name!r}: no held-out image to upsample; add one, or leave the class out")

    @property
    def sha256(self) -> str:
        """Hash of the held-out images and their classes."""
        return sha256(repr([places.tolist() for places in self._places.values()]), self.images_NCHW)

    def originals(self, wanted: Sequence[Request]) -> Tensor:
        """Return the held-out images of some requests at full size, uint8 ``(B, C, H, W)``."""
        places = [self._places[image.label] for image in wanted]
        chosen = torch.stack([of[image.index % len(of)] for of, image in zip(places, wanted, strict=True)])
        return self.images_NCHW.index_select(0, chosen.to(self.images_NCHW.device))

    def __call__(self, wanted: Sequence[Request]) -> Tensor:
        """Return the small images of some requests, uint8 ``(B, C, h, w)``."""
        return to_uint8(lowered(to_unit(self.originals(wanted)), self.factor))


def held_out(dataset: Dataset, upsample: UpsampleConfig) -> HeldOut | None:
    """Return the small images that a model upsamples while it is trained and evaluated; None for an ordinary model."""
    return None if upsample.factor is None else HeldOut(dataset, upsample.factor)


def stored(wanted: Sequence[Request], low_NChw: Tensor) -> Lows:
    """Return small images that were stored with the requests that they belong to."""
    place = {image: number for number, image in enumerate(wanted)}
    return lambda batch: low_NChw[[place[image] for image in batch]]


def bilinear(lows: Lows, wanted: Sequence[Request], size: int) -> Tensor:
    """Return the small images of some requests at full size by bilinear interpolation, uint8 on the CPU."""
    return to_uint8(raised(to_unit(lows(wanted)), size)).cpu()
