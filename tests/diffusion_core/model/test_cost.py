"""What a network costs, against torch-pruning's counter, against counting by hand, and against torch's profiler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, fake_tensors
from tiny import NUM_CLASSES, assert_same_tensors, tiny_config, tiny_network, tiny_state
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion_core.model.cost import count_cost, example_inputs, latencies, peak_memory
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import build_network
from pruning.channels.removal import prune_channels
from pruning.config import PruneConfig
from pruning.masks.strategies import global_magnitude
from pruning.pruner import prune_state

NETWORKS: dict[str, dict[str, Any]] = {
    "dense": {},
    "heads": {"model__num_heads": 2, "model__attention_resolutions": [8, 4]},
    "no labels": {"model__class_conditional": False},
    "other kinds": {
        "model__conditioning": "scale_shift",
        "model__self_conditioning": True,
        "model__learned_variance": True,
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_counts_as_torch_pruning_does(name: str) -> None:
    """Whose way of counting the published figures of Diff-Pruning follow."""
    import torch_pruning

    network = tiny_network(tiny_config(model__channels=16, **NETWORKS[name]))
    for one in (network, prune_channels(network, PruneConfig(method="structured", keep=0.5))[0]):
        macs, params = torch_pruning.utils.count_ops_and_params(copy.deepcopy(one), example_inputs(one))
        cost = count_cost(one)
        assert (cost.macs, cost.params) == (macs, params)
        assert cost.params == cost.nonzero_params == sum(parameter.numel() for parameter in one.parameters())
        layers = [module for module in one.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
        assert cost.channels == sum(len(layer.weight) for layer in layers if layer is not one.conv_out)


def test_pruned_weights_are_not_multiplied_with() -> None:
    network = tiny_network()
    dense = count_cost(network)
    masks = global_magnitude(maskable(network), None, 0.6)
    positions = {}
    for name, module in network.named_modules():
        if f"{name}.weight" in masks:
            module.register_forward_hook(
                lambda module, _inputs, output, name=name: positions.update(
                    {f"{name}.weight": output.numel() // len(module.weight)}
                )
            )
    with torch.no_grad():
        network(*example_inputs(network))
        for name, mask in masks.items():
            network.get_parameter(name).mul_(mask)
    cost = count_cost(network, masks)
    saved = sum(int((~mask).sum()) * positions[name] for name, mask in masks.items())
    assert dense.nonzero_macs == dense.macs == cost.macs
    assert cost.nonzero_macs == cost.macs - saved
    assert dense.params - cost.nonzero_params == sum(int((~mask).sum()) for mask in masks.values())


def test_weights_that_start_at_zero_are_not_pruned() -> None:
    """Only masks prune: an untrained network has as many weights left as it has."""
    config = tiny_config()
    fresh = build_network(config, NUM_CLASSES)
    assert any(not weight.any() for weight in maskable(fresh).values())
    cost = count_cost(fresh)
    assert (cost.nonzero_params, cost.nonzero_macs) == (cost.params, cost.macs)
    state = tiny_state(config)
    report = prune_state(state, config, PruneConfig(method="random", keep=0.5))
    pruned = sum(int((~mask).sum()) for mask in state.extra_parts["masks"].values())
    assert report.before == cost
    assert cost.params - report.after.nonzero_params == pruned > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_attention_multiplies_twice_more(name: str) -> None:
    """As torch counts floating point operations: two a multiply-accumulate, without norms and biases."""
    network = tiny_network(tiny_config(model__channels=16, **NETWORKS[name]))
    for one in (network, prune_channels(network, PruneConfig(method="structured", keep=0.5))[0]):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            one(*example_inputs(one))
        products = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
        cost = count_cost(one)
        assert cost.macs_with_attention - cost.macs == products["aten.bmm"] // 2 > 0


def test_attention_at_large_images_costs_the_square_of_the_pixels() -> None:
    """The CIFAR-10 network at 64 x 64 pixels, by the definition of attention, block by block."""
    config = tiny_config(
        data__name="cifar10",
        data__image_size=64,
        model__channels=128,
        model__channel_multipliers=[1, 2, 2, 2],
        model__num_res_blocks=2,
        model__attention_resolutions=[32],
        model__norm_groups=32,
    )
    with torch.device("meta"):
        cost = count_cost(build_network(config, 10))
    blocks = {32: 2 + 3, 8: 1}  # On the way down, on the way up, and in the middle.
    attention = sum(count * 2 * 256 * (size * size) ** 2 for size, count in blocks.items())
    assert cost.macs_with_attention == cost.macs + attention


@pytest.mark.parametrize("batch", [1, 16])
def test_peak_memory_is_what_the_profiler_sees(batch: int) -> None:
    network = tiny_network(tiny_config(model__channels=16))
    given = example_inputs(network, batch)
    network(*given)
    with torch.no_grad(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        network(*given)
    live = peak = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    weights = sum(parameter.nbytes for parameter in network.parameters()) + sum(tensor.nbytes for tensor in given)
    # The profiler also sees what kernels set aside for themselves, for as long as they run.
    assert 0.8 * (weights + peak) < peak_memory(network, batch) <= weights + peak


def test_measuring_leaves_networks_as_they_were() -> None:
    networks = [tiny_network().train(), tiny_network().eval()]
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    assert all(seconds > 0.0 for seconds in latencies(networks, 2, 0.0, least=2))
    for network in networks:
        count_cost(network)
    assert [network.training for network in networks] == [True, False]
    for network, state in zip(networks, before, strict=True):
        assert_same_tensors(dict(network.state_dict()), state)
        assert not any(module._forward_hooks for module in network.modules())


def test_peak_memory_on_a_gpu_is_the_networks_own() -> None:
    """Not that of the optimizer, the data and other networks, which lie there as well."""
    expected = peak_memory(tiny_network(), 4)
    with fake_tensors():
        with CUDA:
            network = build_network(tiny_config(), NUM_CLASSES).eval()
        alone = peak_memory(network, 4)
        others = torch.empty(2**28, device=CUDA)
        assert peak_memory(network, 4) == alone
        del others
        assert peak_memory(network, 8) > alone
    assert alone == pytest.approx(expected, rel=0.2)
