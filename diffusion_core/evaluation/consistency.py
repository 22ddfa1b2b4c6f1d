"""Similarity of the images of two models, image by image: structural similarity and mean squared difference.

Axes: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core.checkpoint import Checkpoint, CheckpointError
from diffusion_core.config import ConfigError, CoreConfig, SampleConfig, build, flatten
from diffusion_core.config.metrics import count_name
from diffusion_core.distributed import own_positions, sum_over_processes
from diffusion_core.evaluation.generated import generated
from diffusion_core.sampling.generation import Generator

WINDOW, SIGMA = 11, 1.5
"""Size and standard deviation of the Gaussian window (Wang et al. 2004), in pixels; cut to the size of small images."""

K1, K2 = 0.01, 0.03
RANGE = 255.0


@dataclass(frozen=True)
class Consistency:
    """Mean similarity of two models' images from the same seeds and labels.

    Attributes:
        ssim: structural similarity, in [-1, 1]; 1 for equal images.
        mse: mean squared difference of images scaled to [-1, 1]; 0 for equal images.
        num_images: number of images of each model.
        seed: seed of the images.
    """

    ssim: float
    mse: float
    num_images: int
    seed: int

    def figures(self, section: str) -> dict[str, float]:
        """Return the figures by the names that they are logged under, such as ``SECTION/consistency_ssim_16``."""
        count = count_name(self.num_images)
        return {f"{section}/consistency_ssim_{count}": self.ssim, f"{section}/consistency_mse_{count}": self.mse}


def sampled_alike(first: Checkpoint, config: CoreConfig, other: Checkpoint, named: str) -> CoreConfig:
    """Return the configuration of a model that is sampled as another one is, from the same noise.

    Args:
        first: the model that it is compared with.
        config: how that is sampled.
        other: the model.
        named: what names it, for messages.

    Raises:
        CheckpointError: if its images, or its classes, are others.
        ConfigError: if it cannot be sampled so.
    """
    factors = config.upsample.factor, other.config().upsample.factor
    ours, theirs = (
        (model.shape_CHW, model.metadata["num_classes"], factor)
        for model, factor in zip((first, other), factors, strict=True)
    )
    if ours != theirs:
        kind = "{}, {} classes, upsample.factor = {}".format
        raise CheckpointError(f"{named}: images of {kind(*theirs)}; expected {kind(*ours)}, as of the first model")
    classes = zip(first.class_names, other.class_names, range(ours[1]), strict=False)
    for expected, name, label in classes:
        if name != expected:
            raise CheckpointError(f"{named}: class {label} is {name!r}; expected {expected!r}, as of the first model")
    same = {key: value for key, value in flatten(config).items() if key.startswith("sample.")}
    try:
        return build(CoreConfig, flatten(other.config()), same, {"draws": config.draws})
    except ConfigError as error:
        raise ConfigError(*(f"{named}: {problem}" for problem in error.problems)) from None


def consistency_of_images(one_NCHW: Tensor, two_NCHW: Tensor, seed: int) -> Consistency:
    """Return the similarity of uint8 images from one seed, in the same order."""
    ssim, mse = _measures(one_NCHW, two_NCHW).mean(0).tolist()
    return Consistency(ssim, mse, len(one_NCHW), seed)


def consistency_of_models(
    one: Generator, two: Generator, total: int, config: SampleConfig, seed: int, *, progress: bool = False
) -> Consistency:
    """Return the similarity of two models' images. Every process samples a share; all return the same figures.

    Raises:
        ValueError: if the models draw random numbers by different versions, so that their noise differs.
    """
    if one.config.draws != two.config.draws:
        raise ValueError(f"draws = {one.config.draws}, {two.config.draws}: expected the same for both models")
    sums_2, done, own = torch.zeros(2, dtype=torch.float64), 0, own_positions(total)
    pairs = zip(
        generated(one, total, config, seed, progress=progress), generated(two, total, config, seed), strict=True
    )
    for (ours_BCHW, _), (theirs_BCHW, _) in pairs:
        counted = sum(position < total for position in own[done : done + len(ours_BCHW)])
        done += len(ours_BCHW)
        sums_2 += _measures(ours_BCHW[:counted], theirs_BCHW[:counted]).sum(0)
    ssim, mse = (sum_over_processes(sums_2) / total).tolist()
    return Consistency(ssim, mse, total, seed)


def _measures(one_BCHW: Tensor, two_BCHW: Tensor) -> Tensor:
    """Return both measures of each pair of images, ``(B, 2)``."""
    return torch.stack([structural_similarity(one_BCHW, two_BCHW), mean_squared_difference(one_BCHW, two_BCHW)], dim=1)


def structural_similarity(one_BCHW: Tensor, two_BCHW: Tensor) -> Tensor:
    """Return structural similarity (Wang et al. 2004, eq. 13), averaged over channels, ``(B,)`` in [-1, 1]; 1: equal.

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
    """Return the mean squared difference of uint8 images scaled to [-1, 1], ``(B,)``."""
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
    size = min(WINDOW, length - (length + 1) % 2)  # Odd, for a symmetric window.
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-0.5 * (offset / SIGMA) ** 2)
    return weights / weights.sum()
