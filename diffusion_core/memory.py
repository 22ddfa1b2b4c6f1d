"""How much memory training takes, and the largest batch that fits.

What grows with the batch is what the forward pass keeps for the backward pass; what does not is the weights, their
gradients, the optimizer's two moments, and the averages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.config import CoreConfig
from diffusion_core.ema import profiles
from diffusion_core.hardware import autocast, pick_precision
from diffusion_core.sharing import sharers
from diffusion_core.unet import UNet

SHARE = 0.8
"""Share of the free memory that a batch may be planned for: the rest is for what cannot be counted beforehand."""

COPIES = 4
"""Tensors a weight besides its averages: the weight, its gradient, and AdamW's two moments."""

PROBE = 2
"""Images of the small batches that are tried: this many and twice as many."""


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
