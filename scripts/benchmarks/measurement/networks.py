"""The network of Ho et al. 2020 with 35.7 M parameters: ours, and Diffusers' with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_core.config import PRESETS, CoreConfig, build
from diffusion_core.diffusers_io import diffusers_name, unet_config
from diffusion_core.model.unet import UNet, build_network

SMALL: dict[str, Any] = {"model.channels": 32, "model.channel_multipliers": [1, 2], "model.num_res_blocks": 1}
"""For short runs: the same shape, a hundredth of the work."""


def cifar_config(short: bool, **changes: Any) -> CoreConfig:
    """Return the CIFAR-10 preset without labels, as published; in keyword names, two underscores stand for a dot."""
    knobs = {key.replace("__", "."): value for key, value in changes.items()}
    fixed = {"model.class_conditional": False, "log.progress": False, **(SMALL if short else {})}
    return build(CoreConfig, PRESETS["cifar10"], fixed, knobs)


def lively_network(config: CoreConfig, device: torch.device, num_classes: int = 0) -> UNet:
    """Return the network with random weights where its initialisation is zero: the last layer of every branch."""
    network = build_network(config, num_classes)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2 * parameter[0].numel() ** -0.5)
    return network.to(device)


def twin(network: UNet, config: CoreConfig) -> nn.Module:
    """Return Diffusers' UNet2DModel with the same architecture, weights and device."""
    from diffusers import UNet2DModel  # Slow to import, and an optional extra.

    theirs = UNet2DModel(**unet_config(network, config.model))
    theirs.load_state_dict({diffusers_name(name): tensor.cpu() for name, tensor in network.state_dict().items()})
    return theirs.to(next(network.parameters()).device)
