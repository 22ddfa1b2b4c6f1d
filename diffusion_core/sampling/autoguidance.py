"""Autoguidance (Karras et al. 2024): sampling away from a weaker model, such as one's own pruned or early one."""

from __future__ import annotations

from typing import Any

from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError, CoreConfig
from diffusion_core.model.unet import UNet
from diffusion_core.sampling.generation import Generator

FREE_OF_LABELS: dict[str, Any] = {"model.class_conditional": True, "train.label_dropout": 0.1}
"""Knobs of a sampled model with a guide: guidance then does without labels and without their absence."""


def check_guide(guide: Generator, network: UNet, config: CoreConfig) -> None:
    """Check that a model can guide the sampling of a network.

    Args:
        guide: the weaker model.
        network: the network.
        config: its configuration.

    Raises:
        CheckpointError: if it makes other images, upsamples otherwise, or knows other labels.
        ConfigError: if the guidance scale ignores it.
    """
    if config.sample.guidance == 1.0:
        raise ConfigError("sample.guidance = 1.0: ignores the model to guide away from; expected another value")
    shape_CHW = (network.in_channels, network.image_size, network.image_size)
    if guide.shape_CHW != shape_CHW:
        raise CheckpointError(
            f"--guide-checkpoint: makes images of {guide.shape_CHW} (channels, height, width), the model of {shape_CHW}"
        )
    factor, own = guide.config.upsample.factor, config.upsample.factor
    if factor not in (None, own):
        raise CheckpointError(
            f"--guide-checkpoint: upsample.factor = {factor}, of the model {own}; expected the same, or None"
        )
    if guide.network.num_classes not in (0, network.num_classes):
        raise CheckpointError(
            f"--guide-checkpoint: knows {guide.network.num_classes} classes, the model {network.num_classes}; expected "
            "as many, or none"
        )
