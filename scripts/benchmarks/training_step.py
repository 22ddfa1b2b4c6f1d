"""Measure an optimizer step of the 35.7 M parameter network, against Diffusers' plain training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from benchmarks.measurement.networks import cifar_config, lively_network, twin
from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row, against_diffusers
from benchmarks.measurement.timing import alternating
from diffusion_core.config import CoreConfig
from diffusion_core.data.batches import Batches
from diffusion_core.data.datasets import Images
from diffusion_core.hardware import pick_precision
from diffusion_core.model.unet import UNet
from diffusion_core.training.trainer import Callback, TrainState, train

SUBJECT = "training-step"
BATCH = 16
DEFAULT_TARGET, EQUAL_TARGET = 1.7, 1.0


def our_step(
    config: CoreConfig,
    accelerator: Accelerator,
    batch: int,
    steps: int = 1,
    change: Callable[[UNet], UNet] = lambda network: network,
    callbacks: Sequence[Callback] = (),
) -> Callable[[], object]:
    """Return steps of our own loop: batch, draws, loss, gradients, clipping, AdamW, average.

    ``change`` may replace the network before training; ``callbacks`` are called after every step.
    """
    state = TrainState.start(change(lively_network(config, accelerator.device)), config.train, config.ema)
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4 * batch, 3, 32, 32), dtype=torch.uint8, generator=source)
    batches = Batches(
        Images(pixels, torch.zeros(4 * batch, dtype=torch.long)),
        batch_size=batch,
        seed=0,
        horizontal_flip=True,
        device=accelerator.device,
    )
    return lambda: train(state, batches, config, callbacks, accelerator=accelerator, until=state.step + steps)


def peer_step(
    config: CoreConfig, accelerator: Accelerator, batch: int, precision: str, steps: int = 1
) -> Callable[[], object]:
    """Return steps of Diffusers' unconditional example.

    These are noise, timesteps, add_noise, accelerate, clipping, AdamW, and warm-up.
    """
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup

    network = twin(lively_network(config, accelerator.device), config).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.train.lr)
    rates = get_cosine_schedule_with_warmup(optimizer, 500, 100_000)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    images = torch.randn(batch, 3, 32, 32, device=accelerator.device)

    def step() -> None:
        noise = torch.randn(images.shape, device=accelerator.device)
        timesteps = torch.randint(0, 1000, (batch,), device=accelerator.device)
        noisy = scheduler.add_noise(images, noise, timesteps)
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = network(noisy, timesteps).sample
        loss = F.mse_loss(output.float(), noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        loss.detach().item()  # The example's progress bar shows it at every step.

    def run() -> None:
        for _ in range(steps):
            step()

    return run


def measure(options: Options) -> list[Row]:
    """Measure a step in the default precision and in float32, against Diffusers in float32."""
    config = cifar_config(options.short, train__batch_size=BATCH, log__every=1)
    exact = cifar_config(options.short, train__batch_size=BATCH, log__every=1, train__precision="fp32")
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    precision = pick_precision(config.train, accelerator.device)
    times = alternating(
        {
            "ours": our_step(config, accelerator, BATCH),
            "ours, fp32": our_step(exact, accelerator, BATCH),
            "diffusers, fp32": peer_step(exact, accelerator, BATCH, "fp32"),
        },
        options.rounds,
        options.say,
    )
    work = f"batch {BATCH}, against diffusers' example loop in fp32"
    return against_diffusers(SUBJECT, times, precision, work, DEFAULT_TARGET, EQUAL_TARGET)
