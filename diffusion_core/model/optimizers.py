"""PyTorch's optimizers without its compiler, whose import takes a second and a half."""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch

K = TypeVar("K", bound=torch.optim.Optimizer)

METHODS = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
"""Methods that PyTorch hides from its compiler with a decorator. The decorator imports the compiler when called."""


def uncompiled(kind: type[K]) -> type[K]:
    """Return a subclass of an optimizer that computes the same and does not import ``torch._dynamo``.

    Each method is what its decorators wrap. ``step`` runs without gradients, which was its decorator's other task. A
    step of the subclass cannot be part of a compiled function.

    Args:
        kind: an optimizer class of ``torch.optim``.
    """
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in METHODS}
    return type(kind.__name__, (kind,), {"step": torch.no_grad()(inspect.unwrap(kind.step)), **methods})


AdamW = uncompiled(torch.optim.AdamW)
"""AdamW (Loshchilov & Hutter 2019)."""

SGD = uncompiled(torch.optim.SGD)
"""Stochastic gradient descent with momentum."""
