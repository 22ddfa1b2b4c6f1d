"""A chain of models: each one after the first upsamples the images of the one before it (Ho et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_core.checkpoint import Checkpoint, CheckpointError
from diffusion_core.config import SampleConfig
from diffusion_core.data.classes import shown_classes
from diffusion_core.sampling.generation import Generator, Lows, Request


def check_chain(first: Checkpoint, stages: Sequence[Checkpoint]) -> None:
    """Check that each model upsamples images like those of the model before it.

    Raises:
        CheckpointError: if one does not: it upsamples nothing, or has another size, other channels or other classes.
    """
    before = first
    for stage in stages:
        _check_stage(before, stage, first)
        before = stage


def _check_stage(before: Checkpoint, stage: Checkpoint, first: Checkpoint) -> None:
    named, (channels, size, _) = f"--upsample = {str(stage.path)!r}", stage.shape_CHW
    factor = stage.config().upsample.factor
    if factor is None:
        raise CheckpointError(f"{named}: is an ordinary model; expected one that was trained with upsample.factor")
    taken, (made_channels, made, _) = size // factor, before.shape_CHW
    if (channels, taken) != (made_channels, made):
        raise CheckpointError(
            f"{named}: upsamples images of {channels} x {taken} x {taken}; {str(before.path)!r} makes "
            f"{made_channels} x {made} x {made}"
        )
    known, asked = stage.metadata["num_classes"], first.metadata["num_classes"]
    if known and (known != asked or stage.class_names != first.class_names):
        theirs = shown_classes(first.class_names) if asked else "none"
        raise CheckpointError(
            f"{named}: knows the classes {shown_classes(stage.class_names)}; {str(first.path)!r} knows {theirs}; "
            f"expected the same in the same order, or none"
        )


def images_of(generator: Generator, config: SampleConfig, seed: int) -> Lows:
    """Return the images of a model as the small images of the next one."""

    def lows(wanted: Sequence[Request]) -> Tensor:
        return torch.cat([images for _, images in generator.batches(wanted, config, seed)])

    return lows
