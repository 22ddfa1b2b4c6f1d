"""Whether a network is compiled for training or sampling (torch.compile), and what that must save to be worth it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from diffusion_core.config import SampleConfig, TrainConfig
from diffusion_core.model.unet import AttentionBlock, ResidualBlock, UNet

BACKEND = "inductor"
COMPILE_S = 90.0
"""Seconds that compiling the 35.7 M network for training took on an H100 machine with nothing in the compiler's cache
(45 for sampling), beside other compilations."""

GAIN = 0.5
"""Share of the time that the compiled network saved there: 46 ms a step of 256 images, not compiled 108 ms."""

EAGER_FLOPS = 8.6e13
"""Floating point operations a second of the network there that was not compiled, in bf16."""

BACKWARD_COST = 2.0
"""A backward pass computes two products where the forward pass computes one."""

LIMIT = 64
"""Shapes of blocks that torch.compile may specialise for; its own limit of 8 would leave the others uncompiled."""

_compiled: WeakSet[nn.Module] = WeakSet()


def forward_flops(network: UNet) -> int:
    """Floating point operations of one forward pass for one image (two a multiply-accumulate), counted without data."""
    from torch.utils.flop_counter import FlopCounterMode  # Slow to import, and most runs do without it.

    shadow = copy.deepcopy(network).to("meta")
    size = network.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        image = torch.empty(1, network.input_channels, size, size, device="meta")
        shadow(image, torch.empty(1, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


def break_even_seconds() -> float:
    """Uncompiled time beyond which compiling pays: the time that it costs over the share that it saves."""
    return COMPILE_S / GAIN


def pick_compilation(config: TrainConfig, network: UNet, device: torch.device) -> str:
    """What ``train.compile`` comes to: ``none``, ``blocks`` or ``network``.

    ``auto`` decides by the device and the configuration alone, so that a resumed run computes as the unbroken one did:
    ``network`` on a GPU where training would take longer than the break-even, else ``none`` (on a processor it takes
    minutes, and needs a C++ compiler).
    """
    if config.compile != "auto":
        return config.compile
    if device.type != "cuda":
        return "none"
    images = config.steps * config.images_per_step
    seconds = images * forward_flops(network) * (1.0 + BACKWARD_COST) / EAGER_FLOPS
    return "network" if seconds > break_even_seconds() else "none"


def pick_sampling_compilation(config: SampleConfig, network: UNet, device: torch.device, images: int) -> str:
    """What ``sample.compile`` comes to for so many images: ``none`` or ``network``; ``auto`` as in training."""
    if config.compile != "auto":
        return config.compile
    if device.type != "cuda":
        return "none"
    seconds = images * config.steps * forward_flops(network) / EAGER_FLOPS
    return "network" if seconds > break_even_seconds() else "none"


def compile_network(network: UNet, how: str) -> None:
    """Compile a network in place, with static shapes; its parameters and their names stay as they are.

    Args:
        network: any network.
        how: ``network``: as a whole; ``blocks``: each residual and attention block on its own, equal ones once, which
            compiles sooner and saves less; ``none``: not at all.
    """
    if how == "none":
        return
    raise_limit(torch._dynamo.config)
    kinds = (UNet,) if how == "network" else (ResidualBlock, AttentionBlock)
    for module in network.modules():
        if isinstance(module, kinds) and module not in _compiled:
            module.compile(backend=BACKEND, dynamic=False)
            _compiled.add(module)


def raise_limit(settings: Any) -> None:
    """Allow at least :data:`LIMIT` specialisations in the compiler's settings, whatever this torch calls them."""
    name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # Its name in torch 2.6.
    setattr(settings, name, max(LIMIT, getattr(settings, name)))


def compiled(network: UNet) -> Callable[..., Tensor]:
    """A network compiled as a whole, for static shapes; the network itself stays as it is."""
    return torch.compile(network, backend=BACKEND, dynamic=False)
