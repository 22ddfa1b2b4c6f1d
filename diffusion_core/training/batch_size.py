"""Choose the batch size for ``train.batch_size=auto``: the largest one that fits into memory."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_core.cache import cache_path
from diffusion_core.checkpoint import Checkpoint, CheckpointError, newest_checkpoint
from diffusion_core.config import ConfigError, CoreConfig, TrainConfig, read_yaml
from diffusion_core.data.datasets import Dataset
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.losses import diffusion_loss
from diffusion_core.distributed import check_share
from diffusion_core.hardware import algorithms, autocast, pick_precision
from diffusion_core.machine.sharing import sharers
from diffusion_core.model.compilation import compile_network, pick_compilation
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.run_folder import CONFIG_FILE
from diffusion_core.training.ema import copies
from diffusion_core.training.resume import Config, drawing_as, found_by_all
from diffusion_core.training.trainer import TrainState

SHARE = 0.8
"""Share of the free memory to plan for. The rest is for what cannot be counted in advance."""

COPIES = 4
"""Tensors per weight besides its averages: the weight, its gradient, and AdamW's two moments."""

PROBE = 2
"""Images of the smaller of two batches whose memory is counted. The other one has twice as many."""


def settled(config: Config, accelerator: Accelerator, dataset: Dataset, checkpoints: Path) -> Config:
    """Return the configuration with a number as its batch size.

    Args:
        config: returned unchanged unless its batch size is ``auto``.
        accelerator: its processes share a step's batch evenly. The one with the least memory decides.
        dataset: a batch holds at most as many images as there are.
        checkpoints: folder of the run's checkpoints. A resumed run keeps its batch size.

    Raises:
        ConfigError: if the processes cannot share the batch of a resumed run evenly, or find different checkpoints.
    """
    is_auto, config = config.train.batch_size == "auto", as_resumed(config, checkpoints)
    if not is_auto:
        return config
    if config.train.batch_size != "auto":
        return _shared(config, accelerator)
    network = build_network(config, dataset.num_classes).to(accelerator.device)
    limit = len(dataset.train) // accelerator.num_processes
    share = torch.tensor([largest_share(network, config, accelerator, limit)], device=accelerator.device)
    size = int(accelerator.gather(share).min()) * accelerator.num_processes
    if accelerator.is_main_process:
        print(f"train.batch_size=auto: {size} images per step fit into memory", file=sys.stderr)
    return _of_size(config, size)


def settled_again(config: Config, wanted: TrainConfig, accelerator: Accelerator, checkpoints: Path) -> Config:
    """Return a settled configuration with the batch size of a checkpoint that was fetched after :func:`settled`.

    Args:
        config: the result of :func:`settled`.
        wanted: the section as the user gave it. Nothing changes unless its batch size is ``auto``.
        accelerator: its processes call this together.
        checkpoints: folder of the run's checkpoints.

    Raises:
        ConfigError: if the processes cannot share the batch evenly.
    """
    if wanted.batch_size != "auto":
        return config
    resumed = as_resumed(config.model_copy(update={"train": wanted}), checkpoints)
    return config if resumed.train.batch_size == "auto" else _shared(resumed, accelerator)


def _shared(config: Config, accelerator: Accelerator) -> Config:
    check_share(
        config.train, accelerator.num_processes, "the run was started with it; choose another number of processes"
    )
    return config


def _of_size(config: Config, size: int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"batch_size": size})})


def as_resumed(config: Config, checkpoints: Path) -> Config:
    """Return the configuration with what a resumed run keeps: random draws of an earlier version, and a batch size.

    The batch size is that of the run if it is ``auto``, and the run has a checkpoint.
    """
    if not config.checkpoint.resume:
        return config
    with suppress(ConfigError):  # Without a readable file, the checkpoint tells the trial.
        config = drawing_as(config, read_yaml(checkpoints.parent / CONFIG_FILE))
    if config.train.batch_size != "auto":
        return config
    resumed: Checkpoint | None = None
    with suppress(CheckpointError):  # If all are damaged, the trial says so, or fetches others.
        resumed = found_by_all(lambda: newest_checkpoint(checkpoints), checkpoints)
    if resumed is None:
        return config
    return _of_size(config, int(resumed.metadata["config"]["train.batch_size"]))


def largest_share(network: UNet, config: CoreConfig, accelerator: Accelerator, limit: int) -> int:
    """Return the most images, a power of two, that fit into this process's memory. On a GPU, try them.

    One process at a time plans for a GPU. This process keeps the memory that it tried, so that the next process counts
    only what is left.
    """
    device = accelerator.device
    with alone_on(device):
        free = free_memory(device)
        if device.type == "cpu":  # The processes share the machine's memory.
            free //= accelerator.num_processes
        batch = training_memory(network, config).largest_batch(free, max(1, limit))
        while device.type == "cuda" and batch > 1 and not fits(network, config, batch, accelerator.num_processes):
            batch //= 2
    return batch


@contextmanager
def alone_on(device: torch.device) -> Iterator[None]:
    """Keep this user's other processes from planning for the same GPU inside this context. A CPU needs no lock."""
    if device.type != "cuda":
        yield
        return
    name = getattr(torch.cuda.get_device_properties(device), "uuid", device.index or 0)
    file = cache_path("locks", f"gpu-{name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a")
    except OSError:  # Go on without a lock: two processes may then plan for the same memory.
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fits(network: UNet, config: CoreConfig, batch: int, processes: int = 1) -> bool:
    """Return whether a training step with a batch fits into the memory of the network's GPU.

    Args:
        network: the network, which is trained and compiled.
        config: configuration of the run.
        batch: images of this process.
        processes: number of processes, which may decide whether the network is compiled.
    """
    try:
        train_once(network, config, batch, processes)
    except torch.cuda.OutOfMemoryError:
        fitted = False
    else:
        fitted = True
    network.zero_grad(set_to_none=True)
    if not fitted:  # Only here: the exception held the tensors.
        torch.cuda.empty_cache()
    return fitted


def train_once(network: UNet, config: CoreConfig, batch: int, processes: int) -> None:
    """Train for one step on black images, with the compilation, precision, optimizer and averages of the run."""
    device, size = next(network.parameters()).device, network.image_size
    settings = config.train.model_copy(update={"batch_size": batch * processes})
    state = TrainState.start(network.train(), config.train, config.ema)
    compile_network(network, pick_compilation(settings, network, device))
    given = torch.zeros(batch, network.given_channels, size, size, device=device) if config.upsample.wanted else None
    denoiser = Denoiser.from_config(network, config.diffusion, config.model, device).with_given(given)
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
    """Bytes that training a network needs: ``fixed + per_image * batch``.

    Attributes:
        fixed: bytes for any batch.
        per_image: bytes per image of a process's batch.
    """

    fixed: int
    per_image: int

    def largest_batch(self, free: int, limit: int) -> int:
        """Return the largest power of two up to ``limit`` that needs at most ``free`` bytes; at least 1."""
        batch = 1
        while 2 * batch <= limit and self.fixed + 2 * batch * self.per_image <= free:
            batch *= 2
        return batch


def training_memory(network: UNet, config: CoreConfig) -> TrainingMemory:
    """Count the bytes that training needs on the network's device, from the forward passes of two small batches."""
    device = next(network.parameters()).device
    weights = sum(parameter.nbytes for parameter in network.parameters())
    small, large = (kept_for_backward(network, config.train, batch, device) for batch in (PROBE, 2 * PROBE))
    per_image = (large - small) // PROBE
    return TrainingMemory(weights * (COPIES + copies(config.ema)), per_image)


def kept_for_backward(network: UNet, train: TrainConfig, batch: int, device: torch.device) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without weights."""
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
    with hooks, autocast(device, pick_precision(train, device)):
        output = network(images, t_B)  # Its graph keeps the tensors alive until they are counted.
    network.train(was_training)
    del output
    return sum(kept.values())


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device to plan a batch for.

    Trials that share the device (:mod:`diffusion_core.machine.sharing`) get equal parts, in whatever order they start.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        import psutil  # type: ignore[import-untyped]  # Installed with accelerate.

        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return int(SHARE * min(free, total // sharers()))
