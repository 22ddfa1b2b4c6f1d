"""Which device computes, in which precision, memory layout and with which algorithms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_core.config import ConfigError, TrainConfig

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

AUTOCAST: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of the precisions in which networks compute with fewer bits than their weights have."""


NOT_FINITE_REMEDY = "lower sample.guidance, or sample in fp32 (train.precision; --precision of scripts)"
"""What helps where sampled images are not finite."""


def pick_device(config: TrainConfig) -> torch.device:
    """The device that a configuration asks for; ``auto`` takes a GPU if there is one.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda': this machine has no usable GPU; expected auto or cpu")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(config: TrainConfig, device: torch.device) -> Precision:
    """The precision that a configuration asks for.

    ``auto`` is bf16 where the device computes in it, fp16 on older GPUs that have tensor cores, and else fp32.
    """
    if config.precision != "auto":
        return config.precision
    if has_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic of its own, rather than an emulation of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # torch < 2.8 cannot say what the processor has: there, float32 is the safe answer.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    """The context in which networks compute in that precision."""
    dtype = AUTOCAST.get(precision)
    with products(precision), torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Inside, a GPU multiplies float32 numbers exactly (``fp32``) or rounded to TF32's 10 bits; afterwards as before.

    PyTorch's own defaults round in convolutions and not in matrix products.
    """
    libraries: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        for library, allowed in zip(libraries, before, strict=True):
            library.allow_tf32 = allowed


def memory_format(device: torch.device, precision: Precision) -> torch.memory_format:
    """How convolution weights lie in memory: channels last where that is how convolutions compute fastest.

    On a GPU always; on a processor in float32, where a forward pass of the 35.7 M network takes 0.9 of the time, and
    not in bf16.
    """
    last = device.type == "cuda" or precision != "bf16"
    return torch.channels_last if last else torch.contiguous_format


@contextmanager
def algorithms(config: TrainConfig, precision: Precision) -> Iterator[None]:
    """Inside, the GPU's libraries choose their algorithms as ``train.deterministic`` asks; afterwards as before.

    Products are computed as :func:`products` says, also in the backward pass.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Or cuBLAS may split sums differently.
    # Setting it imports PyTorch's compiler, which takes a second and a half.
    if config.deterministic != before:
        torch.use_deterministic_algorithms(config.deterministic)
    try:
        with products(precision), fastest_convolutions(config):
            yield
    finally:
        if config.deterministic != before:
            torch.use_deterministic_algorithms(before)


@contextmanager
def fastest_convolutions(config: TrainConfig) -> Iterator[None]:
    """Inside, cuDNN tries which of its convolutions is fastest for each shape, unless ``train.deterministic`` is set.

    The choice may differ between runs, and so may the last digits.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = not config.deterministic
    try:
        yield
    finally:
        cudnn.benchmark = before


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device. Unlike ``tensor.to(device)``, this does not wait for a GPU."""
    if tensor.is_cuda or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
