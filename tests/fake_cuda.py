"""Tensors that claim to lie on a GPU and hold no numbers: mixed devices and synchronisations show without a GPU.

An operation whose result depends on numbers, such as ``item`` or ``nonzero``, fails on them; on a GPU it would wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")
TRANSFERS = ("aten._to_copy", "aten.copy_")


class OneDevice(TorchDispatchMode):
    """Inside this context operations that mix devices fail, and copies from the GPU, which wait for it.

    Copies to it are allowed, and single numbers of the processor, as on a GPU. Attribute ``waits`` names the copies to
    it for which a GPU's queue is waited for: all but those that say ``non_blocking``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        self.operations.append(name)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device for tensor in given if tensor.ndim or tensor.device.type != "cpu"}
        result = function(*args, **(kwargs or {}))
        if name.startswith(TRANSFERS):
            if CUDA in devices and any(leaf.device.type == "cpu" for leaf in tree_leaves(result)):
                raise RuntimeError(f"{name} waits for the GPU")
            arrived = any(isinstance(leaf, Tensor) and leaf.device == CUDA for leaf in tree_leaves(result))
            sent = any(tensor.ndim and tensor.device.type == "cpu" for tensor in given)
            if arrived and sent and not (kwargs or {}).get("non_blocking"):
                self.waits.append(name)
        elif len(devices) > 1:
            raise RuntimeError(f"{name} mixes {sorted(map(str, devices))}")
        return result


@cache
def are_possible() -> bool:
    """Whether a fake tensor can be filled. PyTorch 2.6 asks for a real GPU."""
    try:
        with FakeTensorMode():
            torch.zeros(2, device=CUDA).uniform_()
    except RuntimeError:
        return False
    return True


@contextmanager
def fake_tensors() -> Iterator[OneDevice]:
    """Inside this context new tensors are fake; yields what notes operations."""
    if not are_possible():
        pytest.skip("fake tensors on a GPU need a driver with this PyTorch")
    with FakeTensorMode(allow_non_fake_inputs=True), OneDevice() as mode:
        yield mode


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """What ``torch.autocast("cuda", torch.bfloat16)`` does, which without a GPU does nothing."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()
