"""Scores of weights at initialisation: SNIP, from a few batches, and SynFlow, without data.

Layers that start at zero (the last of each branch, and of the network) would score zero, and so would all weights
before them, because no gradient passes. Both methods therefore score a copy in which those layers are initialised like
all others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet
from diffusion_core.randomness import Purpose, generator
from pruning.blocks import is_conditioning
from pruning.masks.budgets import uniform
from pruning.masks.mask import WeightMasks, apply_masks
from pruning.masks.strategies import Masks, rank_by_layer, rank_together

SYNFLOW_ITERATIONS = 100
"""Number of iterations (Tanaka et al. 2020). A single iteration would prune whole layers; 100 iterations do not."""
LEAST_SHARE = 0.1
"""Least number of weights that SynFlow leaves a layer, relative to an even share. Without it, the projections of
shortcuts in the way up lose all their weights, as convolutions in parallel multiply a flow of ones by more."""


@torch.no_grad()
def stand_in(network: UNet, seed: int) -> UNet:
    """Return a copy of a network in which layers with only zero weights are drawn anew (Glorot-uniform)."""
    copied = copy.deepcopy(network)
    source = generator(seed, Purpose.REINIT)
    for weight in maskable(copied).values():
        if not weight.any():
            drawn = torch.empty(weight.shape)
            nn.init.xavier_uniform_(drawn, generator=source)
            weight.copy_(drawn)
    return copied


def snip_scores(weights: Mapping[str, Tensor], gradients: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sensitivity of the loss to each weight (Lee et al. 2019, SNIP, eq. 5): ``|weight * dL/dweight|``.

    Args:
        weights: the maskable weights.
        gradients: gradients of the mean loss of each batch, by name of the parameter; they are summed.
    """
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for gradient in gradients:
        for name in total:
            total[name] += gradient[name]
    return {name: (weight.detach() * total[name]).abs() for name, weight in weights.items()}


def synflow_masks(network: UNet, masks: Masks, fraction: float, iterations: int = SYNFLOW_ITERATIONS) -> WeightMasks:
    """Prune the weights with the least synaptic flow, iteratively, without data (Tanaka et al. 2020, algorithm 1).

    All layers on the way of the image are ranked together. Those of time and label are ranked one by one, and keep the
    same share. Tanaka et al. prove that a layer which all paths pass keeps some flow; a layer beside others, such as
    the projection of a shortcut, may still lose all of it. So every layer keeps at least ``LEAST_SHARE`` of what it
    would keep if all kept the same share.

    Args:
        network: a result of :func:`stand_in`; it does not change.
        masks: masks so far, or None.
        fraction: share of all maskable weights, in [0, 1), that is pruned in the result, exact to one weight.
        iterations: number of iterations. After the k-th of n, ``(1 - fraction) ** (k / n)`` of the weights are left.
    """
    flowing = _positive(network)
    for k in range(1, iterations + 1):
        # In the last iteration, avoid the rounding of the power.
        share = fraction if k == iterations else 1.0 - (1.0 - fraction) ** (k / iterations)
        if masks is not None:
            apply_masks(flowing, masks)
        masks = _rank(_flow(flowing), masks, share)
    assert masks is not None
    device = next(network.parameters()).device
    return {name: mask.to(device) for name, mask in masks.items()}


def _rank(scores: Mapping[str, Tensor], masks: Masks, fraction: float) -> WeightMasks:
    """Rank the layers of the image together, and those of time and label each for itself, with exact counts."""
    beside = {name: score for name, score in scores.items() if is_conditioning(name)}
    image = {name: score for name, score in scores.items() if name not in beside}
    whole, part = (sum(score.numel() for score in some.values()) for some in (scores, beside))
    pruned = round(fraction * part)
    apart = rank_by_layer(beside, _of(masks, beside), pruned / part, uniform)
    together = rank_together(
        _protected(image, _of(masks, image), fraction),
        _of(masks, image),
        (round(fraction * whole) - pruned) / (whole - part),
    )
    return {name: (apart if name in beside else together)[name] for name in scores}


def _of(masks: Masks, names: Iterable[str]) -> Masks:
    return None if masks is None else {name: masks[name] for name in names}


def _protected(scores: Mapping[str, Tensor], masks: Masks, fraction: float) -> dict[str, Tensor]:
    """Return scores in which the highest of each layer are infinite: ``LEAST_SHARE`` of its even share of weights."""
    protected = {}
    for name, score in scores.items():
        least = math.ceil(LEAST_SHARE * (1.0 - fraction) * score.numel())
        alive = score if masks is None else score.masked_fill(~masks[name].to(score.device), -1.0)
        highest = alive.flatten().topk(least, sorted=False).indices
        protected[name] = score.flatten().index_fill(0, highest, math.inf).view_as(score)
    return protected


def synflow_scores(network: UNet) -> dict[str, Tensor]:
    """Return the synaptic flow through each weight (Tanaka et al. 2020, eq. 2): ``|weight * dR/dweight|``, in float64.

    R is the sum of the outputs for an input of ones, in a network with the absolute values of the weights, without
    biases, and with everything else linear: activations and norms are identities, and attention adds queries, keys and
    values. R is then a sum over paths of products of weights, and the flow of a weight is the part of R that is lost
    without it.

    The flow through layers on the way of the image comes from the image alone. Time enters every residual block, over
    paths that are shorter and wider than those of the image. Ones as its features as well would contribute nearly all
    of R, and the layers before the last blocks, which only pass on the image, would lose all their weights. The flow
    through layers of time and label is that with ones as the features of the timestep as well.
    """
    return _flow(_positive(network))


@torch.no_grad()
def _positive(network: UNet) -> UNet:
    """Return a copy with absolute weights and zeros elsewhere, in float64: flows exceed float32 in deep networks."""
    copied = copy.deepcopy(network).double().eval().requires_grad_(True)
    weights = maskable(copied)
    for name, parameter in copied.named_parameters():
        if name in weights:
            parameter.abs_()
        else:
            parameter.zero_()
    return copied


def _flow(network: UNet) -> dict[str, Tensor]:
    image, both = (_gradients(network, feature) for feature in (0.0, 1.0))
    return {
        name: (parameter.detach() * (both if is_conditioning(name) else image)[name]).abs()
        for name, parameter in network.named_parameters()
        if name in image
    }


def _gradients(network: UNet, feature: float) -> dict[str, Tensor]:
    """Return the derivatives of R by the maskable weights, with ``feature`` as every feature of the timestep."""
    weights = maskable(network)
    parameters = {name: parameter for name, parameter in network.named_parameters() if name in weights}
    device = next(network.parameters()).device
    size = network.image_size
    ones = torch.ones(1, network.input_channels, size, size, dtype=torch.float64, device=device)
    hook = network.time_mlp.register_forward_pre_hook(lambda _, inputs: torch.full_like(inputs[0], feature))
    try:
        with torch.enable_grad(), _Linear():
            total = network(ones, torch.zeros(1, dtype=torch.long, device=device)).sum()
            gradients = torch.autograd.grad(total, list(parameters.values()))
    finally:
        hook.remove()
    return dict(zip(parameters, gradients, strict=True))


class _Linear(TorchFunctionMode):
    """Inside this context, activations and norms are identities, and attention adds its three inputs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.silu, F.group_norm):
            return args[0]
        if func is F.scaled_dot_product_attention:
            return args[0] + args[1] + args[2]
        return func(*args, **(kwargs or {}))
