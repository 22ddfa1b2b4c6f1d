"""What a network costs: parameters and multiply-accumulates."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from diffusion_core.unet import UNet
from pruning.masks import maskable


@dataclass(frozen=True)
class Cost:
    """Cost of one network evaluation for one image.

    Attributes:
        params: number of parameters.
        nonzero_params: parameters that are not pruned: all but the exact zeros among the maskable weights.
        macs: multiply-accumulates of convolutions, linear layers and norms, as torch-pruning counts them (the
            published figures for Diff-Pruning are counted so); attention's two products are not in it.
    """

    params: int
    nonzero_params: int
    macs: int


def example_inputs(network: UNet) -> tuple[torch.Tensor, ...]:
    """Inputs of a batch of one, on the network's device, as its ``forward`` takes them."""
    device = next(network.parameters()).device
    size = network.image_size
    image = torch.zeros(1, network.input_channels, size, size, device=device)
    t = torch.zeros(1, dtype=torch.long, device=device)
    return (image, t, t.clone()) if network.num_classes else (image, t)


def count_cost(network: UNet) -> Cost:
    """Count what a network costs, by running it once on a copy."""
    import torch_pruning  # Slow to import, and only needed here.

    macs, params = torch_pruning.utils.count_ops_and_params(copy.deepcopy(network), example_inputs(network))
    zeros = sum(int((weight == 0).sum()) for weight in maskable(network).values())
    return Cost(params=int(params), nonzero_params=int(params) - zeros, macs=int(macs))
