"""Which device computes, and in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

from diffusion_core.config import TrainConfig
from diffusion_core.config_io import ConfigError

Precision = Literal["fp32", "bf16"]


def pick_device(config: TrainConfig) -> torch.device:
    """The device that a configuration asks for; ``auto`` takes a GPU if there is one.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda': this machine has no usable GPU; expected auto or cpu")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(config: TrainConfig, device: torch.device) -> Precision:
    """The precision that a configuration asks for; ``auto`` is bf16 where the device computes in it."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if has_bf16(device) else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic of its own, rather than an emulation of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # torch < 2.8 cannot say what the processor has: there, float32 is the safe answer.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context in which networks compute in that precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
