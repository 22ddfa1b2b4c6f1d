"""Feature networks, and checks of images and features.

Axes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffusion_core.data.datasets import Images
from diffusion_core.files import first_not_finite, sha256, sha256_of_file
from diffusion_core.messages import UserError

HASH_DIGITS = 16
"""Number of hexadecimal digits of a SHA-256 in names and protocols."""


class ExtractorError(UserError):
    """A feature network cannot be loaded or used; the message is one line for the user."""


class Extractor(Protocol):
    """A feature network.

    Attributes:
        name: part of the names of its figures; ``inception`` is reserved for pytorch-fid's network with its published
            weights.
        weights: the first digits of the SHA-256 of its weights.
    """

    @property
    def name(self) -> str:
        """Name of the network, as in the names of figures."""

    @property
    def weights(self) -> str:
        """Which weights the network has: a hash or a published name."""

    def __call__(self, images_BCHW: Tensor) -> Judged:
        """Return features and, if the network has classes, logits of uint8 images; float32, on the network's device."""


def images_hash(images: Images) -> str:
    """Return the first ``HASH_DIGITS`` digits of the SHA-256 of images and labels."""
    return sha256(repr(tuple(images.images_NCHW.shape)), images.images_NCHW, images.labels_N)[:HASH_DIGITS]


def weights_file_hash(path: Path) -> str:
    """Return the SHA-256 of a file of weights, 64 hexadecimal digits.

    Raises:
        ExtractorError: if the file cannot be read.
    """
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise ExtractorError(f"{str(path)!r}: {error.strerror}; expected a file of weights") from None


def with_channels(images_BCHW: Tensor, channels: int) -> Tensor:
    """Return uint8 images with another number of channels: repeat the channel of grey images, average three channels.

    Raises:
        ExtractorError: if a number of channels is not 1 or 3.
    """
    present = images_BCHW.shape[1]
    if present == channels:
        return images_BCHW
    if {present, channels} != {1, 3}:
        raise ExtractorError(f"images of {present} channels: expected {channels}; only 1 and 3 can be converted")
    if present == 1:
        return images_BCHW.expand(-1, 3, -1, -1)
    return images_BCHW.float().mean(1, keepdim=True).round().to(torch.uint8)


def check_finite(features_BD: Tensor, what: str) -> None:
    """Check that features are finite.

    Raises:
        ExtractorError: if one is not.
    """
    if not torch.isfinite(features_BD).all():
        raise ExtractorError(f"{what}: its features are not finite; the weights are damaged or do not belong to it")


def check_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that the weights in a file are finite.

    Raises:
        ExtractorError: if one is not. Its features need not show it.
    """
    if bad := first_not_finite(tensors):
        raise ExtractorError(f"{str(path)!r}: {bad!r} holds values that are not finite; take another file")


def fold_norms(module: nn.Module) -> None:
    """Fold the batch norm of every block below a module into its convolution."""
    for child in module.children():
        convolution, norm = getattr(child, "conv", None), getattr(child, "bn", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            child.conv, child.bn = fuse_conv_bn_eval(convolution, norm), nn.Identity()
        else:
            fold_norms(child)


class Judged(NamedTuple):
    """Output of a feature network: features ``(B, D)`` and class logits ``(B, K)``, or None without classes."""

    features_BD: Tensor
    logits_BK: Tensor | None
