"""Feature spaces: what images are compared in.

Axes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion_core.data.datasets import Images

HASH_DIGITS = 16
"""Hexadecimal digits of a SHA-256 that names and protocols show."""


class ExtractorError(ValueError):
    """A feature network that cannot be had or used; the message is one line meant for the user."""


class Extractor(Protocol):
    """A network that images are compared in.

    Attributes:
        name: what figures in its features are called; ``inception`` is pytorch-fid's network with its published
            weights, and nothing else.
        weights: the first digits of the SHA-256 of its weights.
    """

    @property
    def name(self) -> str:
        """Name of the network, as in the names of figures."""

    @property
    def weights(self) -> str:
        """Which weights the network has: a hash or a published name."""

    def __call__(self, images_BCHW: Tensor) -> Judged:
        """uint8 images to features and, where the network knows classes, logits; float32, on the network's device."""


def fingerprint(images: Images) -> str:
    """The first digits of the SHA-256 of images and labels."""
    total = hashlib.sha256(repr(tuple(images.images_NCHW.shape)).encode())
    total.update(images.images_NCHW.cpu().contiguous().numpy().data)
    total.update(images.labels_N.cpu().contiguous().numpy().data)
    return total.hexdigest()[:HASH_DIGITS]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        ExtractorError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExtractorError(f"{str(path)!r}: {error.strerror}; expected a file of weights") from None


def with_channels(images_BCHW: Tensor, channels: int) -> Tensor:
    """uint8 images of so many channels: grey ones are repeated, those in colour averaged (grey ones stay the same).

    Raises:
        ExtractorError: between numbers of channels other than 1 and 3.
    """
    given = images_BCHW.shape[1]
    if given == channels:
        return images_BCHW
    if {given, channels} != {1, 3}:
        raise ExtractorError(f"images of {given} channels for a network of {channels}")
    if given == 1:
        return images_BCHW.expand(-1, 3, -1, -1)
    return images_BCHW.float().mean(1, keepdim=True).round().to(torch.uint8)


def check_finite(features_BD: Tensor, what: str) -> None:
    """Features must be numbers.

    Raises:
        ExtractorError: if one is not.
    """
    if not torch.isfinite(features_BD).all():
        raise ExtractorError(f"{what}: its features are not finite; the weights are damaged or do not belong to it")


class Judged(NamedTuple):
    """What a network makes of images: features ``(B, D)`` and, where it knows classes, logits ``(B, K)``."""

    features_BD: Tensor
    logits_BK: Tensor | None
