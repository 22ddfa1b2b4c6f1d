"""The loss on held-out images with fixed noise, in total and by timestep.

Axes: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_core.config import CoreConfig, UpsampleConfig
from diffusion_core.config.metrics import LOSS_BUCKETS
from diffusion_core.data.datasets import Images, to_unit
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.losses import diffusion_loss
from diffusion_core.diffusion.upsampling import given, lowered
from diffusion_core.distributed import own_positions, sum_over_processes
from diffusion_core.hardware import Precision, autocast
from diffusion_core.model.unet import UNet
from diffusion_core.randomness import Purpose, generator

VALIDATION_SEED = 0
"""Seed of validation noise, the same for all runs, so that runs with different seeds are comparable."""

VALIDATION_BATCH = 256


def validation_loss(network: UNet, images: Images, config: CoreConfig, precision: Precision) -> float:
    """Return the training loss on held-out images, with their labels and with fixed noise and timesteps.

    Timesteps are spread evenly over 0..T-1. Only runs with equal schedule, loss and prediction are comparable.

    Args:
        network: in evaluation mode.
        images: held-out images; the first ``eval.val_images`` of a fixed shuffle are used.
        config: the run's configuration.
        precision: arithmetic of the network.
    """
    loss_N, _ = validation_losses(network, images, config, precision)
    return float(loss_N.mean())


@torch.no_grad()
def validation_losses(network: UNet, images: Images, config: CoreConfig, precision: Precision) -> tuple[Tensor, Tensor]:
    """Return the loss (float64) and timestep of each held-out image, both ``(N,)``; every process computes a share."""
    device = next(network.parameters()).device
    denoiser = Denoiser.from_config(network, config.diffusion, config.model, device)
    source = generator(VALIDATION_SEED, Purpose.VALIDATION)
    order = torch.randperm(len(images), generator=source)[: config.eval.val_images]
    position_N = (torch.arange(len(order)) + 0.5) / len(order)
    t_N = (position_N * config.diffusion.timesteps).long()
    loss_N = torch.zeros(len(order), dtype=torch.float64)
    places = torch.arange(len(order)).split(VALIDATION_BATCH)
    own = set(own_positions(len(places)))
    for number, place_B in enumerate(places):
        # Draw the noise of all images, so that each image gets the same noise for any number of processes.
        noise_BCHW = torch.randn((len(place_B), *images.images_NCHW.shape[1:]), generator=source).to(device)
        if number not in own:
            continue
        batch = images.select(order[place_B]).to(device)
        x0_BCHW, t_B = to_unit(batch.images_NCHW), t_N[place_B].to(device)
        with autocast(device, precision):
            given_BCHW = _given(x0_BCHW, number, config.upsample)
            loss_B = diffusion_loss(
                denoiser.with_given(given_BCHW), x0_BCHW, noise_BCHW, t_B, batch.labels_N, config.diffusion
            )
        loss_N[place_B] = loss_B.double().cpu()
    return sum_over_processes(loss_N), t_N


def _given(x0_BCHW: Tensor, number: int, upsample: UpsampleConfig) -> Tensor | None:
    """Return what an upsampling network is given of a batch; None for another network.

    The level of noise is that of sampling, so that runs of different ``upsample.noise`` are comparable.
    """
    if upsample.factor is None:
        return None
    low_BChw = lowered(x0_BCHW, upsample.factor)
    source = generator(VALIDATION_SEED, Purpose.LOW_NOISE, number)
    noise_BChw = torch.randn(low_BChw.shape, generator=source).to(x0_BCHW.device)
    level_B = torch.full((len(x0_BCHW),), upsample.sample_noise, device=x0_BCHW.device)
    return given(low_BChw, level_B, noise_BChw, x0_BCHW.shape[-1])


def by_timestep(loss_N: Tensor, t_N: Tensor, timesteps: int) -> dict[str, float]:
    """Return the mean loss in ten equal ranges of timesteps, by name; ranges without an image are omitted."""
    bucket_N = t_N * LOSS_BUCKETS // timesteps
    return {f"val/loss_t{part}": float(loss_N[bucket_N == part].mean()) for part in bucket_N.unique().tolist()}
