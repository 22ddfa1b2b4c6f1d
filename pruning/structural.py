"""Structured pruning: whole channels go, by torch-pruning's dependency graph, and a smaller network remains."""

from __future__ import annotations

import copy

import torch
from torch import nn

from diffusion_core.unet import AttentionBlock, UNet
from pruning.cost import example_inputs


def prune_channels(network: UNet, ratio: float) -> UNet:
    """Remove the channels of smallest L2 norm from every layer.

    Group norms keep their number of groups, so that widths stay multiples of it. Attention keeps its heads. The
    image's channels stay.

    Args:
        network: the dense network; it is left as it is.
        ratio: share of the channels of each layer that goes, in (0, 1).

    Returns:
        A smaller network, in the same mode and on the same device.
    """
    import torch_pruning  # Slow to import, and only needed here.

    pruned = copy.deepcopy(network)
    heads: dict[nn.Module, int] = {}
    ratios: dict[nn.Module, float] = {}
    for module in pruned.modules():
        if isinstance(module, AttentionBlock):
            heads |= dict.fromkeys((module.query, module.key, module.value), module.heads)
            # torch-pruning files the channels inside an attention block and those of the residual stream around it by
            # one name, that of the output projection, and forgets the latter, unless they have a ratio of their own.
            ratios[module.out] = ratio
    with torch.enable_grad():
        pruned.requires_grad_(True)
        pruner = torch_pruning.pruner.MagnitudePruner(
            pruned,
            example_inputs(pruned),
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            pruning_ratio_dict=ratios,
            channel_groups={},
            ignored_layers=[pruned.conv_out],
            num_heads=heads,
        )
        pruner.step()
    return pruned.train(network.training)
