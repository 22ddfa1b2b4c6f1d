"""``train.batch_size=auto`` becomes a number: the largest batch that fits, or the one that a resumed run began with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from agent.config import TrialConfig
from diffusion_core.checkpoint import newest_checkpoint
from diffusion_core.config import CoreConfig
from diffusion_core.data import Dataset
from diffusion_core.memory import free_memory, training_memory
from diffusion_core.unet import UNet, build_network


def settled(config: TrialConfig, accelerator: Accelerator, dataset: Dataset, checkpoints: Path) -> TrialConfig:
    """The configuration with a batch size that is a number.

    Args:
        config: returned as it is unless its batch size is ``auto``.
        accelerator: the batch of a step is shared evenly by its processes, the one with the least memory decides.
        dataset: a batch never holds more images than there are.
        checkpoints: of the run; what it was trained with stays.
    """
    if config.train.batch_size != "auto":
        return config
    resumed = newest_checkpoint(checkpoints) if config.checkpoint.resume else None
    if resumed is not None:
        size = int(resumed.metadata["config"]["train.batch_size"])
    else:
        network = build_network(config, dataset.num_classes).to(accelerator.device)
        limit = len(dataset.train) // accelerator.num_processes
        share = torch.tensor([largest_share(network, config, accelerator, limit)], device=accelerator.device)
        size = int(accelerator.gather(share).min()) * accelerator.num_processes
        if accelerator.is_main_process:
            print(f"train.batch_size=auto: {size} images a step fit", file=sys.stderr)
    return config.model_copy(update={"train": config.train.model_copy(update={"batch_size": size})})


def largest_share(network: UNet, config: CoreConfig, accelerator: Accelerator, limit: int) -> int:
    """The most images, a power of two, that this process can train on at once; on a GPU tried out."""
    device = accelerator.device
    free = free_memory(device)
    if device.type == "cpu":  # The processes of a machine share its memory.
        free //= accelerator.num_processes
    batch = training_memory(network, config).largest_batch(free, max(1, limit))
    while device.type == "cuda" and batch > 1 and not fits(network, batch):
        batch //= 2
    return batch


def fits(network: UNet, batch: int) -> bool:
    """Whether a forward and a backward pass of a batch run on the network's GPU without running out of memory."""
    device, size = next(network.parameters()).device, network.image_size
    try:
        images = torch.zeros(batch, network.input_channels, size, size, device=device)
        network(images, torch.zeros(batch, dtype=torch.long, device=device)).float().sum().backward()
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        network.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
