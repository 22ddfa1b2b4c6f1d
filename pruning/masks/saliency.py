"""Scores of weights at initialisation: SNIP, from a few batches, and SynFlow, from none.

Layers that start at zero (the last of each branch, and of the network) would score zero, and every weight before them
too, for no gradient passes. Both methods look at a stand-in, in which those layers start like all others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet
from diffusion_core.randomness import Purpose, generator
from pruning.masks.mask import WeightMasks, apply_masks
from pruning.masks.strategies import Masks, rank_together

SYNFLOW_ITERATIONS = 100
"""Tanaka et al. 2020: at once, whole layers would go; in 100 steps none does."""


@torch.no_grad()
def stand_in(network: UNet, seed: int) -> UNet:
    """A copy of a network in which layers whose weights are all zero are drawn anew (Glorot-uniform)."""
    copied = copy.deepcopy(network)
    source = generator(seed, Purpose.REINIT)
    for weight in maskable(copied).values():
        if not weight.any():
            drawn = torch.empty(weight.shape)
            nn.init.xavier_uniform_(drawn, generator=source)
            weight.copy_(drawn)
    return copied


def snip_scores(weights: Mapping[str, Tensor], gradients: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """How much the loss feels each connection (Lee et al. 2019, SNIP, eq. 5): ``|weight * dL/dweight|``.

    Args:
        weights: the maskable weights.
        gradients: of the mean loss over each of some batches, by name of the parameter.
    """
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for gradient in gradients:
        for name in total:
            total[name] += gradient[name]
    return {name: (weight.detach() * total[name]).abs() for name, weight in weights.items()}


def synflow_masks(network: UNet, masks: Masks, fraction: float, iterations: int = SYNFLOW_ITERATIONS) -> WeightMasks:
    """Prune what carries least synaptic flow, step by step, without any data (Tanaka et al. 2020, algorithm 1).

    Args:
        network: a stand-in; it is left as it is.
        masks: what is pruned already, or None.
        fraction: share of all maskable weights, in [0, 1), that is pruned in the result, exact to one weight.
        iterations: after the k-th of n, ``keep ** (k / n)`` of the weights are left.
    """
    flowing = _positive(network)
    for k in range(1, iterations + 1):
        # The last one exactly, whatever the power makes of it.
        share = fraction if k == iterations else 1.0 - (1.0 - fraction) ** (k / iterations)
        if masks is not None:
            apply_masks(flowing, masks)
        masks = rank_together(_flow(flowing), masks, share)
    assert masks is not None
    device = next(network.parameters()).device
    return {name: mask.to(device) for name, mask in masks.items()}


def synflow_scores(network: UNet) -> dict[str, Tensor]:
    """Synaptic flow through each weight (Tanaka et al. 2020, eq. 2): ``|weight * dR/dweight|``, in float64.

    R is the sum of the outputs for an input of ones, in the network with the absolute values of its weights, without
    biases, and with everything else linear: activations and norms pass on what they get, and attention adds up queries,
    keys and values. So R is a sum over paths, of products of the weights on each, and a weight's flow is the part of R
    that is lost without it.
    """
    return _flow(_positive(network))


@torch.no_grad()
def _positive(network: UNet) -> UNet:
    """A copy with absolute weights and nothing else, in float64: flows grow beyond float32 in deep networks."""
    copied = copy.deepcopy(network).double().eval().requires_grad_(True)
    weights = maskable(copied)
    for name, parameter in copied.named_parameters():
        if name in weights:
            parameter.abs_()
        else:
            parameter.zero_()
    return copied


def _flow(network: UNet) -> dict[str, Tensor]:
    parameters = {name: parameter for name, parameter in network.named_parameters() if name in maskable(network)}
    device = next(network.parameters()).device
    size = network.image_size
    ones = torch.ones(1, network.input_channels, size, size, dtype=torch.float64, device=device)
    hook = network.time_mlp.register_forward_pre_hook(lambda _, inputs: torch.ones_like(inputs[0]))
    try:
        with torch.enable_grad(), _Linear():
            total = network(ones, torch.zeros(1, dtype=torch.long, device=device)).sum()
            gradients = torch.autograd.grad(total, list(parameters.values()))
    finally:
        hook.remove()
    return {
        name: (parameter.detach() * gradient).abs()
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


class _Linear(TorchFunctionMode):
    """Inside this context activations and norms pass on what they get, and attention adds up its three inputs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.silu, F.group_norm):
            return args[0]
        if func is F.scaled_dot_product_attention:
            return args[0] + args[1] + args[2]
        return func(*args, **(kwargs or {}))
