"""The averages of the weights, each against its closed form."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_tensors, cpu, lively, tiny_batches, tiny_config, tiny_state
from torch import Tensor, nn

from diffusion_core.checkpoint import read_checkpoint, write_checkpoint
from diffusion_core.config import EmaConfig, flatten
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.training.ema import Ema, power_exponent
from diffusion_core.training.trainer import TrainState, train
from pruning.masks.mask import hold_masks
from pruning.masks.strategies import global_magnitude


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
        decays.append(1.0 - ema.share("decay"))
        ema.updates += 1
    assert decays[:3] == pytest.approx([1 / 10, 2 / 11, 3 / 12])
    assert decays[100] == pytest.approx(101 / 110)
    assert decays[-1] == pytest.approx(0.99, rel=1e-12)
    assert decays == sorted(decays)
    start, target = network(0), network(1)
    warm = Ema(start, EmaConfig(decay=0.99))
    warm.update(target)
    warm.update(target)
    expected = flat(target) + (1 / 10) * (2 / 11) * (flat(start) - flat(target))
    assert (flat(warm.network) - expected).abs().max() < 1e-6


def test_buffers_are_copied() -> None:
    source: Any = network()
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


# Power functions of training time.


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.15, 0.25])
def test_a_power_profile_has_the_width_that_was_asked_for(width: float) -> None:
    """Karras et al. 2024, section 3: the standard deviation of the weights t^gamma, relative to training time."""
    gamma = power_exponent(width)
    t = (torch.arange(400_000).double() + 0.5) / 400_000
    density = t**gamma / (t**gamma).sum()
    mean = (density * t).sum()
    assert (density * (t - mean).square()).sum().sqrt().item() == pytest.approx(width, rel=1e-4)
    if width in (0.05, 0.1):  # As published: 16.97 and 6.94.
        assert gamma == pytest.approx({0.05: 16.97, 0.1: 6.94}[width], abs=0.005)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_a_power_profile_is_the_average_weighted_by_a_power_of_time(width: float) -> None:
    config = EmaConfig(power_widths=[width], sampled="power")
    gamma = power_exponent(width)
    ema = Ema(network(99), config)  # What it starts from is forgotten by the first update.
    count = 40
    weights = [network(k) for k in range(1, 6)]
    path = [flat(weights[k % 5]) for k in range(count)]
    for k in range(count):
        ema.update(weights[k % 5])
    # The weights of update k stand for the time from k - 1 to k, over which t^gamma is integrated.
    shares = [((k + 1) / count) ** (gamma + 1) - (k / count) ** (gamma + 1) for k in range(count)]
    assert sum(shares) == pytest.approx(1.0)
    expected = sum(share * step for share, step in zip(shares, path, strict=True))
    assert (flat(ema.network) - expected).abs().max() < 1e-5


def test_a_power_profile_of_a_straight_path_lies_where_calculus_says() -> None:
    """The average of t with weights t^gamma over (0, n) is n (gamma + 1) / (gamma + 2)."""
    ema = Ema(network(), EmaConfig(power_widths=[0.1], sampled="power"))
    moving, start, away = network(0), network(0), network(1)
    count = 200
    with torch.no_grad():
        for k in range(1, count + 1):
            for now, first, last in zip(moving.parameters(), start.parameters(), away.parameters(), strict=True):
                now.copy_(first + (last - first) * k / count)
            ema.update(moving)
    gamma = power_exponent(0.1)
    along = (flat(ema.network) - flat(start)).dot(flat(away) - flat(start)) / (flat(away) - flat(start)).square().sum()
    assert along.item() == pytest.approx((gamma + 1) / (gamma + 2), abs=1 / count)


def test_the_plain_average_starts_when_asked() -> None:
    ema = Ema(network(99), EmaConfig(average_from=4, sampled="average"))
    for k in range(1, 5):
        ema.update(network(k))
        assert torch.equal(flat(ema.network), flat(network(k)))  # Until then it follows.
    for k in range(5, 12):
        ema.update(network(k))
        expected = sum(flat(network(i)) for i in range(5, k + 1)) / (k - 4)
        assert (flat(ema.network) - expected).abs().max() < 1e-6
    whole = Ema(network(99), EmaConfig(average_from=0, sampled="average"))
    for k in range(1, 4):
        whole.update(network(k))
    assert (flat(whole.network) - sum(flat(network(i)) for i in (1, 2, 3)) / 3).abs().max() < 1e-6


@pytest.mark.parametrize("settings", [{"average_from": 0}, {"power_widths": [0.1]}], ids=["average", "power"])
def test_averages_over_many_updates_do_not_stall(settings: dict[str, Any]) -> None:
    """From 1 towards 1.005, after a million updates: in float32, each update would be lost."""
    ema = Ema(network(), EmaConfig(**settings))
    (profile,) = ema.precise
    moving = network()
    count, done = 100, 1_000_000
    for parameter in (*moving.parameters(), *ema.networks[profile].parameters()):
        parameter.data.fill_(1.0)
    ema.load(profile, ema.networks[profile].state_dict(), None)
    ema.updates = done
    expected = 1.0
    for parameter in moving.parameters():
        parameter.data.fill_(1.005)
    target = float(torch.tensor(1.005))
    for _ in range(count):
        expected += ema.share(profile) * (target - expected)
        ema.update(moving)
    assert ema.share(profile) * 0.005 < 2.0**-24  # Half the distance to the next float32 after 1.
    assert expected - 1.0 > 4e-7
    found = flat(ema.networks[profile])
    assert (found - expected).abs().max().item() <= 2.0**-24 * 1.01


def test_masked_weights_stay_zero_in_every_average() -> None:
    config = tiny_config(**SEVERAL, ema__sampled="average")
    state = tiny_state(config)
    for k in range(1, 4):
        state.ema.update(network(k))
    hold_masks(state, global_magnitude(maskable(state.network), None, 0.5))
    train(state, tiny_batches(config), config, accelerator=cpu(), until=3)
    for averaged in state.ema.networks.values():
        weights = maskable(averaged)
        assert all(not weights[name][~mask].any() for name, mask in state.extra_parts["masks"].items())
    for averages in state.ema.precise.values():
        assert all(not averages[name][~mask].any() for name, mask in state.extra_parts["masks"].items())


SEVERAL = {"ema__power_widths": [0.05, 0.1], "ema__average_from": 2, "ema__warmup": False}


@pytest.mark.parametrize(("sampled", "profile"), [("decay", "decay"), ("power", "power0_05"), ("average", "average")])
def test_sampled_says_which_average_the_network_is(sampled: str, profile: str) -> None:
    config = tiny_config(**SEVERAL, ema__sampled=sampled).ema
    ema = Ema(network(), config)
    assert list(ema.networks) == ["decay", "power0_05", "power0_1", "average"]
    for k in range(1, 5):
        ema.update(network(k))
    assert ema.network is ema.networks[profile]
    alone = Ema(network(), EmaConfig(decay=config.decay, warmup=False))
    for k in range(1, 5):
        alone.update(network(k))
    assert torch.equal(flat(alone.network), flat(ema.networks["decay"]))  # The others do not disturb it.
    every = [flat(averaged) for averaged in ema.networks.values()]
    assert all(not torch.equal(one, other) for i, one in enumerate(every) for other in every[:i])
    assert math.isclose(config.decay, 0.9)


@pytest.mark.parametrize("sampled", ["decay", "power", "average"])
def test_every_average_survives_a_pause_bit_for_bit(sampled: str, tmp_path: Path) -> None:
    config = tiny_config(**SEVERAL, ema__sampled=sampled, train__steps=7)
    straight = train(tiny_state(config), tiny_batches(config), config, accelerator=cpu())
    halved = train(tiny_state(config), tiny_batches(config), config, accelerator=cpu(), until=4)
    metadata = {
        "config": flatten(config),
        "image_shape": [1, 8, 8],
        "num_classes": 10,
        "class_names": list("0123456789"),
        "structure": {},
        "figures": {},
        **halved.metadata(),
    }
    checkpoint = write_checkpoint(tmp_path, halved.step, metadata, halved.parts())
    assert {part for part in checkpoint.parts if part.startswith("float64-")} == {
        "float64-power0_05",
        "float64-power0_1",
        "float64-average",
    }
    assert {part for part in checkpoint.parts if part.startswith("ema-")} | {"ema"} == {
        "ema",
        *(
            f"ema-{profile}"
            for profile in straight.ema.networks
            if straight.ema.networks[profile] is not straight.ema.network
        ),
    }
    assert_same_tensors(checkpoint.network().state_dict(), halved.ema.network.state_dict())
    resumed = TrainState.restore(read_checkpoint(tmp_path), config.train, config.ema, torch.device("cpu"))
    train(resumed, tiny_batches(config), config, accelerator=cpu())
    assert resumed.ema.updates == straight.ema.updates == 7
    assert len(straight.ema.networks) == 4
    for part, tensors in straight.parts().items():
        assert_same_tensors(tensors, resumed.parts()[part])
    older = {part: tensors for part, tensors in halved.parts().items() if not part.startswith("float64-")}
    checkpoint = write_checkpoint(tmp_path / "older", halved.step, metadata, older)
    old = TrainState.restore(checkpoint, config.train, config.ema, torch.device("cpu"))
    for profile, averages in old.ema.precise.items():
        rounded = {name: average.float() for name, average in averages.items()}
        assert_same_tensors(rounded, dict(old.ema.networks[profile].state_dict()))
