"""Decide whether to compile a network (torch.compile) for training or sampling, and compile it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from diffusion_core.cache import cache_path
from diffusion_core.config import SampleConfig, TrainConfig
from diffusion_core.model.unet import AttentionBlock, ResidualBlock, UNet

BACKEND = "inductor"
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable with the folder where PyTorch keeps compiled code."""

COMPILE_S = 90.0
"""Seconds to compile the 35.7 M parameter network for training on an H100 machine (45 for sampling), with an empty
compiler cache, while other compilations ran."""

GAIN = 0.5
"""Share of the time that compiling saves, rounded down. Measured there: 46 ms per step of 256 images, 108 ms before."""

EAGER_FLOPS = 8.6e13
"""Floating point operations per second of the uncompiled network there, in bf16."""

BACKWARD_COST = 2.0
"""Cost of a backward pass in forward passes: it computes two products where the forward pass computes one."""

LIMIT = 64
"""Number of block shapes that torch.compile may specialise for. Its default limit of 8 leaves the others uncompiled."""

_compiled: WeakSet[nn.Module] = WeakSet()


def forward_flops(network: UNet) -> int:
    """Count the floating point operations of a forward pass of one image, two per multiply-accumulate, without data."""
    from torch.utils.flop_counter import FlopCounterMode  # Slow to import, and most runs do not need it.

    shadow = copy.deepcopy(network).to("meta")
    size = network.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        image = torch.empty(1, network.input_channels, size, size, device="meta")
        shadow(image, torch.empty(1, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


def break_even_seconds() -> float:
    """Return the uncompiled seconds above which compiling pays off: its cost divided by the share that it saves."""
    return COMPILE_S / GAIN


def pick_compilation(config: TrainConfig, network: UNet, device: torch.device) -> str:
    """Resolve ``train.compile`` to ``none``, ``blocks`` or ``network``.

    ``auto`` depends only on the device and the configuration, so that a resumed run computes the same as an
    uninterrupted one. It is ``network`` on a GPU if training would take longer than the break-even, else ``none``.
    On a CPU, compiling takes minutes and needs a C++ compiler.
    """
    if config.compile != "auto":
        return config.compile
    if device.type != "cuda":
        return "none"
    images = config.steps * config.images_per_step
    seconds = images * forward_flops(network) * (1.0 + BACKWARD_COST) / EAGER_FLOPS
    return "network" if seconds > break_even_seconds() else "none"


def pick_sampling_compilation(config: SampleConfig, network: UNet, device: torch.device, images: int) -> str:
    """Resolve ``sample.compile`` for a number of images to ``none`` or ``network``. ``auto`` decides as in training."""
    if config.compile != "auto":
        return config.compile
    if device.type != "cuda":
        return "none"
    seconds = images * config.steps * forward_flops(network) / EAGER_FLOPS
    return "network" if seconds > break_even_seconds() else "none"


def compile_network(network: UNet, how: str) -> None:
    """Compile a network in place, with static shapes. Its parameters and their names do not change.

    Args:
        network: the network.
        how: ``network``: as a whole; ``blocks``: each residual and attention block separately, equal ones once, which
            compiles faster and saves less; ``none``: do nothing.
    """
    if how == "none":
        return
    prepare_compiler()
    raise_limit(torch._dynamo.config)
    kinds = (UNet,) if how == "network" else (ResidualBlock, AttentionBlock)
    for module in network.modules():
        if isinstance(module, kinds) and module not in _compiled:
            module.compile(backend=BACKEND, dynamic=False)
            _compiled.add(module)


def prepare_compiler() -> None:
    """Keep compiled code, and silence the compiler's advice to use TF32: ``train.precision`` decides about it."""
    keep_compiled()
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")


def keep_compiled() -> None:
    """Have PyTorch keep compiled code in this project's cache, so that the next trial of a sweep loads it.

    PyTorch keeps it below ``/tmp``, which nodes of a cluster empty. ``$TORCHINDUCTOR_CACHE_DIR`` is respected, and a
    cache that cannot be written is not used.
    """
    if CACHE_VARIABLE in os.environ:
        return
    folder = cache_path("compiled", "inductor")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ[CACHE_VARIABLE] = str(folder)


def raise_limit(settings: Any) -> None:
    """Allow at least :data:`LIMIT` specialisations. The name of the compiler's setting depends on torch's version."""
    name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # Its name in torch 2.6.
    setattr(settings, name, max(LIMIT, getattr(settings, name)))


def compiled(network: UNet) -> Callable[..., Tensor]:
    """Return a network compiled as a whole, for static shapes. The network itself does not change."""
    prepare_compiler()
    return torch.compile(network, backend=BACKEND, dynamic=False)
