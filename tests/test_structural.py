"""Structured pruning: a smaller network that works, trains and survives the disk; the dense one is left as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_CLASSES, assert_same_tensors, cpu, lively, tiny_batches, tiny_config, tiny_network, tiny_state
from torch import Tensor, nn

from diffusion_core.checkpoint import read_checkpoint, write_checkpoint
from diffusion_core.config import CoreConfig
from diffusion_core.config_io import flatten
from diffusion_core.structure import structure
from diffusion_core.trainer import TrainState, train
from diffusion_core.unet import AttentionBlock, UNet
from pruning.config import PruneConfig
from pruning.cost import count_cost
from pruning.pruner import is_pruned, prune_state
from pruning.structural import prune_channels

RATIOS = [0.25, 0.5, 0.75]


def config(heads: int = 1, labels: bool = True, **changes: Any) -> CoreConfig:
    return tiny_config(
        model__channels=16, model__num_heads=heads, model__class_conditional=labels, train__steps=12, **changes
    )


def params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 8, 8, generator=source), torch.tensor([0, 20, 49]), torch.tensor([1, 5, -1])


def save(folder: Path, state: TrainState, settings: CoreConfig) -> None:
    metadata = {
        "config": flatten(settings),
        "image_shape": [1, 8, 8],
        "num_classes": state.network.num_classes,
        "class_names": list("0123456789"),
        "structure": structure(state.network, settings.model),
        "figures": {},
        **state.metadata(),
    }
    write_checkpoint(folder, state.step, metadata, state.parts())


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_pruned_network_is_smaller_works_and_keeps_its_interface(ratio: float, labels: bool, heads: int) -> None:
    network = tiny_network(config(heads, labels))
    smaller = prune_channels(network, ratio)
    x, t, classes = inputs()
    with torch.no_grad():
        answer = smaller(x, t, classes)
        assert answer.shape == x.shape
        assert torch.isfinite(answer).all()
        assert answer.std() > 0
        if labels:
            assert not torch.equal(answer, smaller(x, t, classes.roll(1)))  # Labels still enter,
        assert not torch.equal(answer, smaller(x, t.roll(1), classes))  # and timesteps.
    # Channels come and go on both sides of a layer, so that weights fall by the square.
    kept = 1 - ratio
    assert params(smaller) / params(network) == pytest.approx(kept**2, abs=0.02)
    assert count_cost(smaller).macs / count_cost(network).macs == pytest.approx(kept**2, abs=0.02)
    assert smaller.num_classes == network.num_classes
    assert smaller.conv_out.out_channels == smaller.conv_in.in_channels == 1


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("attention", [[], [4], [8, 4]])
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_layer_loses_its_share(ratio: float, attention: list[int], heads: int) -> None:
    """Also the residual stream around attention. (These widths are multiples of groups and heads: none is rounded.)"""
    network = tiny_network(config(heads, model__attention_resolutions=attention))
    fixed = {"conv_in.in_channels", "conv_out.out_channels", "time_mlp.0.in_features"}  # Image and timestep.
    smaller = prune_channels(network, ratio)
    dense = dict(network.named_modules())
    for name, module in smaller.named_modules():
        for size in ("in_channels", "out_channels", "in_features", "out_features", "num_channels", "embedding_dim"):
            if hasattr(module, size) and not isinstance(module, UNet):
                expected = getattr(dense[name], size) * (1 if f"{name}.{size}" in fixed else 1 - ratio)
                assert getattr(module, size) == expected, f"{name}.{size}"


@pytest.mark.parametrize("heads", [1, 2])
def test_widths_fit_groups_and_heads(heads: int) -> None:
    smaller = prune_channels(tiny_network(config(heads)), 0.5)
    for module in smaller.modules():
        if isinstance(module, nn.GroupNorm):
            assert module.num_channels % module.num_groups == 0
        if isinstance(module, AttentionBlock):
            assert module.heads == heads
            assert module.query.out_features == module.key.out_features
            assert module.query.out_features % heads == module.value.out_features % heads == 0


def test_the_dense_network_is_left_as_it_was() -> None:
    network = tiny_network().train()
    network.conv_in.weight.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    smaller = prune_channels(network, 0.5)
    assert_same_tensors(dict(network.state_dict()), dict(before))
    assert network.training
    assert smaller.training
    assert not network.conv_in.weight.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    ours = {id(parameter) for parameter in network.parameters()}
    assert not any(id(parameter) in ours for parameter in smaller.parameters())
    assert structure(network, tiny_config().model) == {}


def test_the_channels_of_smallest_norm_go() -> None:
    """Half of the channels inside a residual block are made tiny; they are the ones that go, and nothing changes."""
    settings = config()
    network = tiny_network(settings)
    block = network.middle[0]
    inner = block.conv1.out_channels
    groups = block.norm2.num_groups
    # torch-pruning takes the same number from every group of a norm: every second channel is weak.
    weak = torch.arange(inner) % 2 == 1
    with torch.no_grad():
        for tensor in (block.conv1.weight, block.conv1.bias, block.embed.weight, block.embed.bias):
            tensor[weak] *= 1e-6
        for tensor in (block.norm2.weight, block.norm2.bias):
            tensor[weak] *= 1e-6
        block.conv2.weight[:, weak] *= 1e-6
    smaller = prune_channels(network, 0.5)
    pruned = smaller.middle[0]
    assert pruned.conv1.out_channels == inner // 2
    assert pruned.norm2.num_groups == groups
    assert pruned.norm2.weight.abs().min() > 1e-4
    strong = network.middle[0].norm2.weight.detach()[~weak]
    torch.testing.assert_close(pruned.norm2.weight.detach(), strong)


@pytest.mark.parametrize(("heads", "labels"), [(1, True), (2, True), (1, False)])
@pytest.mark.parametrize("ratio", RATIOS)
def test_training_goes_on_and_survives_the_disk(tmp_path: Path, ratio: float, heads: int, labels: bool) -> None:
    settings = config(heads, labels, train__weight_decay=0.01)
    batches = tiny_batches(settings)
    state = TrainState.start(tiny_network(settings), settings)
    train(state, batches, settings, accelerator=cpu(), until=4)
    dense = state.network
    report = prune_state(state, settings, PruneConfig(method="structured", keep=1 - ratio))
    assert (report.method, report.step, state.step) == ("structured", 4, 4)
    assert report.before == count_cost(dense)
    assert report.after == count_cost(state.network)
    assert report.sparsity == pytest.approx(1 - params(state.network) / params(dense))
    assert is_pruned(state)
    assert structure(state.ema.network, settings.model) == structure(state.network, settings.model)

    assert structure(state.network, settings.model)
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    train(state, batches, settings, accelerator=cpu(), until=6)
    changed = [name for name, tensor in state.network.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) > 0.9 * len(before)  # The optimizer holds the new weights, not the old ones.
    assert state.ema.updates == 2
    assert not torch.equal(state.ema.network.conv_in.weight, before["conv_in.weight"])

    save(tmp_path, state, settings)
    restored = TrainState.restore(read_checkpoint(tmp_path), settings, torch.device("cpu"))
    assert is_pruned(restored)
    for part, tensors in state.parts().items():
        assert_same_tensors(tensors, restored.parts()[part])
    for one in (state, restored):
        train(one, batches, settings, accelerator=cpu())
    for part, tensors in state.parts().items():
        assert_same_tensors(tensors, restored.parts()[part])


def test_pruning_twice_works() -> None:
    network = tiny_network(config())
    once = prune_channels(network, 0.25)
    twice = prune_channels(once, 0.4)
    assert params(twice) < params(once) < params(network)
    with torch.no_grad():
        assert torch.isfinite(twice(*inputs())).all()


def test_the_published_architecture_can_be_pruned() -> None:
    """At a quarter of its width; 32 groups, four resolutions, attention at 16."""
    settings = CoreConfig().model.model_copy(update={"channels": 32, "norm_groups": 8})
    network = lively(UNet(settings, 32, 3, NUM_CLASSES)).eval()
    smaller = prune_channels(network, 0.3)
    assert params(smaller) < 0.7 * params(network)
    with torch.no_grad():
        assert smaller(torch.zeros(1, 3, 32, 32), torch.tensor([5]), torch.tensor([3])).shape == (1, 3, 32, 32)


def test_an_untrained_network_can_be_pruned() -> None:
    """Whose last layers are zero: nobody divides by their norm."""
    settings = config()
    state = tiny_state(settings)
    prune_state(state, settings, PruneConfig(method="structured", keep=0.5))
    assert all(torch.isfinite(parameter).all() for parameter in state.network.parameters())
    assert prune_channels(tiny_network(settings).eval(), 0.5).training is False
