"""pytorch-fid's Inception-v3.

Inception is named ``inception`` only with the published weights. Its figures are then called FID and KID. With other
weights, its name contains their hash.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.cache import cache_path, keep
from diffusion_core.config.metrics import INCEPTION
from diffusion_core.evaluation.features import (
    HASH_DIGITS,
    ExtractorError,
    Judged,
    check_finite,
    check_weights,
    fold_norms,
    weights_file_hash,
    with_channels,
)
from diffusion_core.messages import one_line

if TYPE_CHECKING:
    from torchvision.models import Inception3

PUBLISHED_HASH = "6726825d"
"""The first digits of the SHA-256 of the published weights, from their file name."""

FILE_NAME = f"pt_inception-2015-12-05-{PUBLISHED_HASH}.pth"
CLASSES = 1008
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
"""Errors of a download that are not the network's."""

SIZE = 299


class InceptionExtractor:
    """pytorch-fid's network: 2048 features, and logits without bias, which the Inception score uses.

    Batch norms are folded into convolutions, and the memory format is channels last, which is faster.

    Args:
        network: what :func:`build_inception` returned, on its device.
        digest: SHA-256 of its weights' file.
    """

    def __init__(self, network: Inception3, digest: str) -> None:
        published = digest.startswith(PUBLISHED_HASH)
        self.name = INCEPTION if published else f"{INCEPTION}-{digest[:8]}"
        self.weights = digest[:HASH_DIGITS]
        self.classes_KD = network.fc.weight
        self.layers = nn.Sequential(*(layer for name, layer in network.named_children() if name not in SKIPPED))
        fold_norms(self.layers)
        self.layers.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images_BCHW: Tensor) -> Judged:
        """Map uint8 images, ``(B, C, H, W)``, to features, ``(B, 2048)``, and logits, ``(B, 1008)``, in float32."""
        x_BCHW = with_channels(images_BCHW.to(self.classes_KD.device), 3).float() / 255.0
        x_BCHW = F.interpolate(x_BCHW, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        x_BCHW = (2.0 * x_BCHW - 1.0).contiguous(memory_format=torch.channels_last)
        features_BD = self.layers(x_BCHW).flatten(1)
        return Judged(features_BD, features_BD @ self.classes_KD.T)


SKIPPED = ("AuxLogits", "dropout", "fc")
"""Layers that the features do not pass through."""


def build_inception() -> Inception3:
    """Return pytorch-fid's network without weights; its own constructor would download them."""
    from pytorch_fid import inception as parts  # Slow to import: torchvision comes along.
    from torchvision.models import Inception3

    network = Inception3(num_classes=CLASSES, aux_logits=False, init_weights=False)
    network.Mixed_5b = parts.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = parts.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = parts.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = parts.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = parts.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = parts.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = parts.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = parts.FIDInceptionE_1(1280)
    network.Mixed_7c = parts.FIDInceptionE_2(2048)
    return network


def read_inception(path: Path, device: torch.device) -> InceptionExtractor:
    """Return pytorch-fid's network with weights from a file, without running code from the file.

    Raises:
        ExtractorError: if the file is missing, damaged, or not of that network, or a weight is not finite.
    """
    digest = weights_file_hash(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            network = build_inception()
        network.load_state_dict(weights, assign=True)
    except Exception as error:  # torch.load raises errors of many types on damaged files.
        reason = one_line(error)
        raise ExtractorError(f"{str(path)!r}: not Inception weights in pytorch-fid's format ({reason})") from None
    check_weights(network.state_dict(), path)
    network = network.float().to(device).eval().requires_grad_(False)
    extractor = InceptionExtractor(network, digest)
    check_finite(extractor(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).features_BD, repr(str(path)))
    return extractor


def download_inception() -> Path:
    """Return the published weights from the cache; download them from pytorch-fid's address if missing (about 90 MB).

    Raises:
        ExtractorError: if the download fails.
    """
    path = cache_path("inception", FILE_NAME)
    if not path.is_file() and not keep(path, _download):
        raise ExtractorError("Inception weights: the cache cannot hold the download; see above")
    return path


def _download(to: Path) -> None:
    """Download the published weights. All errors but those of the disk are :class:`ExtractorError`."""
    from pytorch_fid.inception import FID_WEIGHTS_URL

    try:
        torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(to), hash_prefix=PUBLISHED_HASH, progress=False)
    except Exception as error:  # Downloads raise errors of many types; the remedy is the same.
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise
        raise ExtractorError(
            f"Inception weights: cannot download {FID_WEIGHTS_URL} ({one_line(error)}); copy the file from another "
            f"machine and set --inception-weights FILE, or the knob eval.inception_weights"
        ) from None
