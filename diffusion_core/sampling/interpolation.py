"""Interpolate between the images of two seeds or of two labels.

Images are sampled in batches of ``config.batch_size``. All images of a row have equal noise, so batches change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion_core.config import SampleConfig
from diffusion_core.data.datasets import to_uint8
from diffusion_core.sampling.generation import Generator, Request
from diffusion_core.sampling.samplers import steps_of


@torch.no_grad()
def between_seeds(
    generator: Generator, request: Request, config: SampleConfig, seeds: tuple[int, int], weights: Sequence[float]
) -> Tensor:
    """Interpolate between the images of two seeds: ``(len(weights), C, H, W)`` uint8 on the CPU.

    The initial noise is interpolated on the sphere, so that it stays normal. The noise of later steps is that of the
    first seed for all images.
    """
    steps = steps_of(config, generator.schedule)

    def sampled(weights_B: Tensor) -> Tensor:
        wanted = [request] * len(weights_B)
        noise, other = (generator.noise(wanted, seed) for seed in seeds)
        angle_B = weights_B.view(-1, 1, 1, 1) * (math.pi / 2.0)
        start_BCHW = angle_B.cos() * noise() + angle_B.sin() * other()
        labels_B = torch.full((len(wanted),), request.label, device=generator.device)
        denoiser = generator.denoiser(given_BCHW=generator.given(wanted, seeds[0]))
        guided_denoiser = generator.guided(denoiser, config, steps)
        return generator.from_start(denoiser, guided_denoiser, start_BCHW, labels_B, noise, config, steps)

    return _in_batches(sampled, weights, config, generator)


@torch.no_grad()
def between_labels(
    generator: Generator, index: int, config: SampleConfig, seed: int, labels: tuple[int, int], weights: Sequence[float]
) -> Tensor:
    """Interpolate between the images of two labels: ``(len(weights), C, H, W)`` uint8 on the CPU.

    All images use the noise of the first label's image. Every step mixes the estimates of the clean image for the two
    labels.
    """
    steps = steps_of(config, generator.schedule)

    def sampled(weights_B: Tensor) -> Tensor:
        wanted = [Request(labels[0], index)] * len(weights_B)
        noise, given_BCHW = generator.noise(wanted, seed), generator.given(wanted, seed)
        first_B, second_B = (torch.full((len(wanted),), label, device=generator.device) for label in labels)
        one, two = generator.denoiser(given_BCHW=given_BCHW), generator.denoiser(given_BCHW=given_BCHW)
        guided_one, guided_two = generator.guided(one, config, steps), generator.guided(two, config, steps)

        def mixed(x_BCHW: Tensor, t_B: Tensor, _: Tensor | None) -> Tensor:
            share_B111 = weights_B.view(-1, 1, 1, 1)
            return torch.lerp(guided_one(x_BCHW, t_B, first_B), guided_two(x_BCHW, t_B, second_B), share_B111)

        return generator.from_start(one, mixed, noise(), first_B, noise, config, steps)

    return _in_batches(sampled, weights, config, generator)


def _in_batches(
    sampled: Callable[[Tensor], Tensor], weights: Sequence[float], config: SampleConfig, generator: Generator
) -> Tensor:
    """Return the images of all weights, of which ``sampled`` returns those of a batch, as uint8 on the CPU."""
    batches = torch.tensor(weights, device=generator.device).split(config.batch_size)
    return torch.cat([to_uint8(sampled(weights_B)).cpu() for weights_B in batches])
