"""What a model that upsamples is compared with: bilinear interpolation of the same small images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffusion_core.config import SampleConfig, UpsampleConfig
from diffusion_core.distributed import own_positions
from diffusion_core.evaluation.suite import Judgement, Suite
from diffusion_core.sampling.generation import Generator, all_labels, round_robin
from diffusion_core.sampling.lows import bilinear

BILINEAR = "bilinear/"
"""Prefix of the figures of bilinear interpolation. A sweep must not rank models by them."""


def bilinear_judgement(suite: Suite, generator: Generator, total: int, config: SampleConfig) -> Judgement:
    """Return the figures of bilinear interpolation, with their prefix; none for a model that does not upsample.

    All processes call this together.

    Args:
        suite: measures the figures.
        generator: the model; its small images are interpolated.
        total: number of images.
        config: the number of images at once.
    """
    if generator.lows is None:
        return Judgement()
    found = suite.judge(_interpolated(generator, total, config.batch_size), total, source(generator.config.upsample))
    figures = {f"{BILINEAR}{name}": value for name, value in found.figures.items()}
    return Judgement(figures, {f"{BILINEAR}{name}": line for name, line in found.protocols.items()})


def source(upsample: UpsampleConfig) -> str:
    """Return where interpolated images come from, for protocols."""
    return f"bilinear, {upsample.factor}x from held-out images"


def _interpolated(generator: Generator, total: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's share of the interpolated images of the requests that evaluation samples."""
    assert generator.lows is not None
    wanted = round_robin(all_labels(generator.network), own_positions(total))
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start : start + batch_size]
        yield bilinear(generator.lows, batch, generator.shape_CHW[-1]), torch.tensor([image.label for image in batch])
