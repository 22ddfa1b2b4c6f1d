"""Masks over weights: which there are, and how they are kept while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffusion_core.trainer import TrainState

WeightMasks = dict[str, Tensor]
"""Name of a weight to a bool tensor of its shape: True stays, False is pruned."""


def maskable(network: nn.Module) -> dict[str, Tensor]:
    """The weights that may be pruned: those of convolutions and linear layers, detached.

    Biases, the gains of norms and the label embedding are never pruned.
    """
    return {
        f"{name}.weight": module.weight.detach()
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """Share of the maskable weights that is pruned, in [0, 1]."""
    total = sum(mask.numel() for mask in masks.values())
    return 1.0 - sum(int(mask.sum()) for mask in masks.values()) / total


@torch.no_grad()
def apply_masks(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set pruned weights to zero, in place."""
    weights = maskable(network)
    torch._foreach_mul_(
        [weights[name] for name in masks], [mask.to(weights[name].dtype) for name, mask in masks.items()]
    )


def attach_masks(state: TrainState, masks: WeightMasks) -> None:
    """Prune a training state and keep it pruned: in the weights, their average, and the optimizer's moments.

    From now on gradients of pruned weights are zero, so that they count neither in the clipping norm nor in the
    moments, and after every optimizer step pruned weights are set to exact zero, whatever momentum or weight decay did.

    Raises:
        ValueError: if the masks do not fit the network.
    """
    weights = maskable(state.network)
    if set(weights) != set(masks) or any(masks[name].shape != weight.shape for name, weight in weights.items()):
        raise ValueError("the masks are not those of this network: names or shapes differ")
    device = next(iter(weights.values())).device
    masks = {name: mask.to(device) for name, mask in masks.items()}
    apply_masks(state.network, masks)
    for averaged in state.ema.networks.values():
        apply_masks(averaged, masks)
    for name, parameter in state.network.named_parameters():
        if name not in masks:
            continue
        parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
        for moment in state.optimizer.state.get(parameter, {}).values():
            if moment.shape == parameter.shape:
                moment.mul_(masks[name])
    state.optimizer.register_step_post_hook(lambda *_: apply_masks(state.network, masks))
