"""The moving average of the weights, against its closed form."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import lively, tiny_config
from torch import Tensor, nn

from diffusion_core.config import EmaConfig
from diffusion_core.ema import Ema
from diffusion_core.unet import UNet, build_network


def network(seed: int = 0) -> UNet:
    return lively(build_network(tiny_config(), 10), seed)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


def test_closed_form_for_weights_that_stay() -> None:
    """After n updates towards the same weights w: w + decay^n (start - w)."""
    start, target = network(0), network(1)
    ema = Ema(start, EmaConfig(decay=0.8, warmup=False))
    assert torch.equal(flat(ema.network), flat(start))
    for n in range(1, 12):
        ema.update(target)
        expected = flat(target) + 0.8**n * (flat(start) - flat(target))
        assert (flat(ema.network) - expected).abs().max() < 1e-5
    assert ema.updates == 11


def test_closed_form_for_weights_that_move() -> None:
    """After n updates: decay^n start + (1 - decay) sum_k decay^(n - k) w_k."""
    decay, start = 0.9, network(0)
    ema = Ema(start, EmaConfig(decay=decay, warmup=False))
    expected = flat(start) * decay**6
    for k in range(1, 7):
        ema.update(network(k))
        expected += (1 - decay) * decay ** (6 - k) * flat(network(k))
    assert (flat(ema.network) - expected).abs().max() < 1e-5


def test_warm_up_averages_over_fewer_steps_at_first() -> None:
    ema = Ema(network(), EmaConfig(decay=0.99, warmup=True))
    decays = []
    for _ in range(1200):
        decays.append(ema.decay())
        ema.updates += 1
    assert decays[:3] == pytest.approx([1 / 10, 2 / 11, 3 / 12])
    assert decays[100] == pytest.approx(101 / 110)
    assert decays[-1] == 0.99
    assert decays == sorted(decays)
    start, target = network(0), network(1)
    warm = Ema(start, EmaConfig(decay=0.99))
    warm.update(target)
    warm.update(target)
    expected = flat(target) + (1 / 10) * (2 / 11) * (flat(start) - flat(target))
    assert (flat(warm.network) - expected).abs().max() < 1e-6


def test_buffers_are_copied() -> None:
    source = network()
    source.register_buffer("seen", torch.tensor(1))
    ema = Ema(source, EmaConfig(decay=0.5, warmup=False))
    source.seen += 6
    ema.update(source)
    assert ema.network.seen == 7


def test_the_average_neither_trains_nor_disturbs_training() -> None:
    source = lively(build_network(tiny_config(model__dropout=0.5), 10)).train()
    before = copy.deepcopy(source.state_dict())
    ema = Ema(source, EmaConfig(decay=0.5))
    assert source.training
    assert not any(module.training for module in ema.network.modules())
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    assert all(parameter.requires_grad for parameter in source.parameters())
    for _ in range(3):
        ema.update(source)
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, before[name])
    # No memory is shared: what training does to the weights does not reach the average by itself.
    with torch.no_grad():
        source.conv_in.weight.zero_()
    assert ema.network.conv_in.weight.any()
