"""Measure DDIM with the 35.7 M parameter network, against Diffusers' pipeline with the same weights."""

from __future__ import annotations

import copy

import torch

from benchmarks.measurement.networks import cifar_config, lively_network, twin
from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row, against_diffusers
from benchmarks.measurement.timing import alternating
from diffusion_core.hardware import pick_device, pick_precision
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.sampling.generation import Generator, requests

SUBJECT = "sampling"
BATCH, STEPS, SHORT_STEPS = 16, 50, 3
DEFAULT_TARGET, EQUAL_TARGET = 1.6, 1.05


def measure(options: Options) -> list[Row]:
    """Measure sampling in the default precision and in float32, against Diffusers in float32."""
    from diffusers import DDIMPipeline, DDIMScheduler

    steps = SHORT_STEPS if options.short else STEPS
    config = cifar_config(options.short, sample__steps=steps, sample__batch_size=BATCH)
    device = pick_device(config.train)
    network = lively_network(config, device).eval()
    pipeline = DDIMPipeline(twin(network, config).eval(), DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)
    wanted = requests([NO_LABEL], BATCH)
    precision = pick_precision(config.train, device)
    # Each has its own weights, because their memory layout depends on the precision.
    ours, exact = Generator(copy.deepcopy(network), config, precision), Generator(network, config, "fp32")
    times = alternating(
        {
            "ours": lambda: ours.images(wanted, config.sample, 0),
            "ours, fp32": lambda: exact.images(wanted, config.sample, 0),
            "diffusers, fp32": lambda: pipeline(
                BATCH, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np"
            ),
        },
        options.rounds,
        options.say,
    )
    work = f"DDIM {steps} steps, batch {BATCH}, against diffusers' DDIMPipeline in fp32"
    return against_diffusers(SUBJECT, times, precision, work, DEFAULT_TARGET, EQUAL_TARGET)
