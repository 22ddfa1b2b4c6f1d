"""Optimizers without the compiler compute what PyTorch's do, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diffusion_core.model import optimizers

SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    for _ in range(count):
        model(torch.randn(5, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_and_moments_are_those_of_pytorch(name: str) -> None:
    ours, theirs = network(), network()
    made = getattr(optimizers, name)(ours.parameters(), **SETTINGS[name])
    expected = getattr(torch.optim, name)(theirs.parameters(), **SETTINGS[name])
    assert isinstance(made, getattr(torch.optim, name))
    steps(ours, made, 4, 1)
    steps(theirs, expected, 4, 1)
    resumed = getattr(optimizers, name)(ours.parameters(), **SETTINGS[name])
    resumed.load_state_dict(made.state_dict())
    steps(ours, resumed, 3, 2)
    steps(theirs, expected, 3, 2)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    (group,), (wanted,) = resumed.state_dict()["param_groups"], expected.state_dict()["param_groups"]
    assert group == wanted
    for index, moments in expected.state_dict()["state"].items():
        for key, value in moments.items():
            assert torch.equal(resumed.state_dict()["state"][index][key], value), key


def test_a_hook_before_or_after_a_step_is_called_once() -> None:
    model, called = network(), []
    optimizer = optimizers.AdamW(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    steps(model, optimizer, 1, 0)
    assert called == ["before", "after"]
