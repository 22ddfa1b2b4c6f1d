"""What it costs to sample an image: network evaluations and multiply-accumulates."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_core.config import DiffusionConfig, ModelConfig, SampleConfig
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.model.cost import count_cost
from diffusion_core.model.unet import UNet
from diffusion_core.sampling.guidance import between_levels, decided, guided
from diffusion_core.sampling.samplers import build_sampler, steps_of

MACS = "sample/macs"
"""Multiply-accumulates of one image: those of an evaluation times the evaluations."""
EVALUATIONS = "sample/evaluations"
"""Network evaluations of one image; guidance counts twice."""
SECONDS = "sample/seconds"
"""Seconds of one image in a batch of ``LATENCY_BATCH``, on this machine."""


@torch.no_grad()
def network_evaluations(sample: SampleConfig, diffusion: DiffusionConfig, model: ModelConfig) -> int:
    """Return how often the network is evaluated for one image. Classifier-free guidance evaluates it twice.

    It is counted, not computed: the sampler runs with a network that only counts, for one image of one pixel. So it
    holds for every sampler, also for those of plugins, and for guidance in an interval.
    """
    counted = 0

    def network(x_BCHW: Tensor, _t_B: Tensor, _labels_B: Tensor | None) -> Tensor:
        nonlocal counted
        counted += len(x_BCHW)
        outputs = 2 if model.learned_variance else 1
        return torch.zeros(len(x_BCHW), outputs, 1, 1)

    denoiser = Denoiser.from_config(network, diffusion, model, torch.device("cpu"))
    interval = sample.guidance_interval
    applies = between_levels(denoiser.schedule, *interval) if interval else None
    steps = steps_of(sample, denoiser.schedule)
    sampler = build_sampler(sample, denoiser)
    labels_B = torch.zeros(1, dtype=torch.long)
    pixel = torch.zeros(1, 1, 1, 1)
    sampler(
        guided(denoiser, sample.guidance, applies=applies, known=decided(applies, steps) if applies else None),
        pixel,
        steps,
        labels_B,
        noise=lambda: pixel,
    )
    return counted


def image_costs(
    network: UNet, sample: SampleConfig, diffusion: DiffusionConfig, model: ModelConfig
) -> dict[str, float]:
    """Return the evaluations and the multiply-accumulates of one image, ``sample/evaluations`` and ``sample/macs``.

    Masked weights count, since they are multiplied. See :class:`~diffusion_core.model.cost.Cost` for what counts.
    """
    evaluations = network_evaluations(sample, diffusion, model)
    return {EVALUATIONS: evaluations, MACS: evaluations * count_cost(network).macs}
