"""The largest batch that fits: ``train.batch_size=auto`` becomes a number, from what training takes in memory."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_core.cache import cache_path
from diffusion_core.checkpoint import newest_checkpoint
from diffusion_core.config import CoreConfig
from diffusion_core.data.datasets import Dataset
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.losses import diffusion_loss
from diffusion_core.hardware import algorithms, autocast, pick_precision
from diffusion_core.model.compilation import compile_network, pick_compilation
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.sharing import sharers
from diffusion_core.training.ema import profiles
from diffusion_core.training.trainer import TrainState

SHARE = 0.8
"""Share of the free memory that a batch may be planned for: the rest is for what cannot be counted beforehand."""

COPIES = 4
"""Tensors a weight besides its averages: the weight, its gradient, and AdamW's two moments."""

PROBE = 2
"""Images of the small batches that are tried: this many and twice as many."""


Config = TypeVar("Config", bound=CoreConfig)


def settled(config: Config, accelerator: Accelerator, dataset: Dataset, checkpoints: Path) -> Config:
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
    """The most images, a power of two, that this process can train on at once; on a GPU tried out.

    One process at a time plans for a GPU. What the try took stays with this process, so that the next one finds only
    what is left.
    """
    device = accelerator.device
    with alone_on(device):
        free = free_memory(device)
        if device.type == "cpu":  # The processes of a machine share its memory.
            free //= accelerator.num_processes
        batch = training_memory(network, config).largest_batch(free, max(1, limit))
        while device.type == "cuda" and batch > 1 and not fits(network, config, batch, accelerator.num_processes):
            batch //= 2
    return batch


@contextmanager
def alone_on(device: torch.device) -> Iterator[None]:
    """Inside this context no other process of this user plans for the same GPU; on a processor nothing is done."""
    if device.type != "cuda":
        yield
        return
    name = getattr(torch.cuda.get_device_properties(device), "uuid", device.index or 0)
    file = cache_path("locks", f"gpu-{name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a")
    except OSError:  # Without a lock two processes may plan for the same memory.
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fits(network: UNet, config: CoreConfig, batch: int, processes: int = 1) -> bool:
    """Whether training takes a step with a batch on the network's GPU without running out of memory.

    Args:
        network: it is trained and compiled.
        config: of the training.
        batch: images of this process.
        processes: how many train together, which may decide whether the network is compiled.
    """
    try:
        train_once(network, config, batch, processes)
    except torch.cuda.OutOfMemoryError:
        fitted = False
    else:
        fitted = True
    network.zero_grad(set_to_none=True)
    if not fitted:  # Now that the exception, which held the tensors, is gone.
        torch.cuda.empty_cache()
    return fitted


def train_once(network: UNet, config: CoreConfig, batch: int, processes: int) -> None:
    """Take a step on empty images as training does: compiled or not, in its precision, with optimizer and averages."""
    device, size = next(network.parameters()).device, network.image_size
    settings = config.train.model_copy(update={"batch_size": batch * processes})
    state = TrainState.start(network.train(), config)
    compile_network(network, pick_compilation(settings, network, device))
    denoiser = Denoiser.from_config(network, config, device)
    images = torch.zeros(batch, network.in_channels, size, size, device=device)
    zeros = torch.zeros(batch, dtype=torch.long, device=device)
    shown = torch.ones(batch, dtype=torch.bool, device=device) if config.model.self_conditioning else None
    precision = pick_precision(settings, device)
    with algorithms(settings, precision):
        with autocast(device, precision):
            labels = zeros if network.num_classes else None
            loss = diffusion_loss(denoiser, images, torch.zeros_like(images), zeros, labels, config.diffusion, shown)
        loss.mean().backward()
        state.optimizer.step()
        state.ema.update(network)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training a network takes: ``fixed + per_image * batch``.

    Attributes:
        fixed: whatever the batch.
        per_image: for each image that a process has in its batch.
    """

    fixed: int
    per_image: int

    def largest_batch(self, free: int, limit: int) -> int:
        """The largest power of two, at most ``limit``, whose training takes at most ``free`` bytes; at least 1."""
        batch = 1
        while 2 * batch <= limit and self.fixed + 2 * batch * self.per_image <= free:
            batch *= 2
        return batch


def training_memory(network: UNet, config: CoreConfig) -> TrainingMemory:
    """Count what training takes on the network's device, by running two small batches forwards."""
    device = next(network.parameters()).device
    weights = sum(parameter.nbytes for parameter in network.parameters())
    small, large = (kept_for_backward(network, config, batch, device) for batch in (PROBE, 2 * PROBE))
    per_image = (large - small) // PROBE
    return TrainingMemory(weights * (COPIES + len(profiles(config.ema))), per_image)


def kept_for_backward(network: UNet, config: CoreConfig, batch: int, device: torch.device) -> int:
    """Bytes that a forward pass of a batch keeps for the backward pass, weights left out."""
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    shape = batch, network.input_channels, network.image_size, network.image_size
    was_training = network.training
    network.train()
    images, t_B = torch.zeros(shape, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast(device, pick_precision(config.train, device)):
        output = network(images, t_B)  # Its graph holds what was kept until all is counted.
    network.train(was_training)
    del output
    return sum(kept.values())


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, as far as a batch may be planned for them.

    Trials that were started to share the device (:mod:`diffusion_core.sharing`) get equal parts of it, whichever plans
    first.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        import psutil  # type: ignore[import-untyped]  # accelerate brings it along.

        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return int(SHARE * min(free, total // sharers()))
