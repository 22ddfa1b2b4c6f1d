"""Draw noise, timesteps, dropped labels and small images of a training step. They depend on seed and step only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from diffusion_core.config import CoreConfig
from diffusion_core.data.batches import Batches
from diffusion_core.diffusion.schedule import NoiseSchedule
from diffusion_core.diffusion.upsampling import given, lowered
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.randomness import Purpose

SELF_CONDITIONING_SHARE = 0.5
"""Share of training images for which the network gets an estimate of the clean image (Chen et al. 2022)."""


@dataclass(frozen=True)
class Draws:
    """One process's share of a training step.

    Attributes:
        x0_BCHW: clean images in [-1, 1].
        noise_BCHW: noise to add.
        t_B: timesteps, int64, or float32 if they may lie between two timesteps.
        labels_B: classes, ``NO_LABEL`` where the label was dropped.
        shown_B: for self-conditioning, whether the network gets an estimate of the image (bool); else None.
        later_BS: for step distillation, S timesteps after ``t_B``, float32, or -1 for the clean image; else None.
        given_BCHW: for upsampling, what the network is given of the small images; else None.
    """

    x0_BCHW: Tensor
    noise_BCHW: Tensor
    t_B: Tensor
    labels_B: Tensor
    shown_B: Tensor | None
    later_BS: Tensor | None = None
    given_BCHW: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the attributes, in the order of the constructor's arguments."""
        return tuple(getattr(self, attribute.name) for attribute in fields(self))

    def chunks(self, count: int) -> Iterator[Draws]:
        """Yield the draws in ``count`` equal parts."""
        size = len(self.t_B) // count
        for start in range(0, size * count, size):
            parts: list[Any] = [None if tensor is None else tensor[start : start + size] for tensor in self.tensors()]
            yield Draws(*parts)


def draw(step: int, batches: Batches, config: CoreConfig, schedule: NoiseSchedule) -> Draws:
    """Return this process's share of a step's draws.

    Every process draws for the whole batch and takes its share, so that the number of processes does not matter.
    """
    x0_BCHW, labels_B = batches.at(step)
    size, share = batches.batch_size, batches.share
    source = batches.stream(Purpose.NOISE, step)
    (noise_BCHW,) = source.normal(size, *x0_BCHW.shape[1:])
    if config.diffusion.timestep_sampling == "uniform":
        (t_B,) = source.integers(schedule.timesteps, size)
    else:
        (normal_B,) = source.normal_float64(size)
        levels_B = (config.diffusion.lognormal_mean + config.diffusion.lognormal_std * normal_B).exp()
        t_B = schedule.position(levels_B)
        # The variational bound is defined between neighbouring timesteps.
        t_B = t_B.round().long() if config.model.learned_variance else t_B.float()
    dropped_B = source.uniform(size)[0] < config.train.label_dropout
    if config.diffusion.offset_noise:
        (offset_BC11,) = source.normal(size, x0_BCHW.shape[1], 1, 1)
        noise_BCHW = noise_BCHW + config.diffusion.offset_noise * offset_BC11
    shown_B = None
    if config.model.self_conditioning:
        shown_B = (source.uniform(size)[0] < SELF_CONDITIONING_SHARE)[share]
    labels_B = torch.where(dropped_B[share], NO_LABEL, labels_B)
    given_BCHW = None
    if config.upsample.factor is not None:
        given_BCHW = _given(step, x0_BCHW, batches, config, config.upsample.factor)
    return Draws(x0_BCHW, noise_BCHW[share], t_B[share], labels_B, shown_B, given_BCHW=given_BCHW)


def _given(step: int, x0_BCHW: Tensor, batches: Batches, config: CoreConfig, factor: int) -> Tensor:
    """Return the small images of a process's share of a step, with noise of levels from 0 to ``upsample.noise``."""
    low_BChw = lowered(x0_BCHW, factor)
    source = batches.stream(Purpose.LOW_NOISE, step)
    (noise_BChw,) = source.normal(batches.batch_size, *low_BChw.shape[1:])
    level_B = config.upsample.noise * source.uniform(batches.batch_size)[0]
    return given(low_BChw, level_B[batches.share], noise_BChw[batches.share], x0_BCHW.shape[-1])
