"""Tensors that claim to lie on a GPU and hold no numbers: what devices an operation mixes shows without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")
TRANSFERS = ("aten._to_copy", "aten.copy_")


class OneDevice(TorchDispatchMode):
    """Inside this context operations that mix devices fail; copies may, and numbers of the processor, as on a GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device for tensor in given if tensor.ndim or tensor.device.type != "cpu"}
        if len(devices) > 1 and not str(function).startswith(TRANSFERS):
            raise RuntimeError(f"{function} mixes {sorted(map(str, devices))}")
        return function(*args, **(kwargs or {}))


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside this context new tensors are fake."""
    with FakeTensorMode(allow_non_fake_inputs=True), OneDevice():
        yield
