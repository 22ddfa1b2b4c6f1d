"""Masks over weights, and how pruned weights stay at zero during training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffusion_core.model.structure import maskable
from diffusion_core.training.trainer import TrainState
from pruning.blocks import block_of

WeightMasks = dict[str, Tensor]
"""Maps names of weights to bool tensors of their shapes: True is kept, False is pruned."""

MASKS_PART = "masks"
"""The checkpoint's part with the masks."""

_HOOKS: WeakKeyDictionary[torch.optim.Optimizer, list[RemovableHandle]] = WeakKeyDictionary()
"""The hooks that hold the masks of a training state, by its optimizer, so that other masks can replace them."""


def counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of weights that each mask keeps, by name."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """Return the pruned share of the maskable weights, in [0, 1]."""
    total = sum(mask.numel() for mask in masks.values())
    return 1.0 - sum(counts(masks).values()) / total


def block_sparsity(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the pruned share of the weights of each block, in [0, 1], in the order of the masks."""
    left, total = Counter[str](), Counter[str]()
    for name, mask in masks.items():
        left[block_of(name)] += int(mask.sum())
        total[block_of(name)] += mask.numel()
    return {block: 1.0 - left[block] / total[block] for block in total}


def empty_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """Return the layers without remaining weights, which only output their bias."""
    return [name.removesuffix(".weight") for name, left in counts(masks).items() if left == 0]


def check_masks(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Check that masks are those of a network.

    Raises:
        ValueError: if names or shapes differ.
    """
    weights = maskable(network)
    if set(weights) != set(masks) or any(masks[name].shape != weight.shape for name, weight in weights.items()):
        raise ValueError("the masks are not those of this network: names or shapes differ")


def as_factor(mask: Tensor, weight: Tensor) -> Tensor:
    """Return a mask as 0 and 1 with its weight's device, type and memory layout, so that their product is fast."""
    if (mask.device, mask.dtype, mask.stride()) == (weight.device, weight.dtype, weight.stride()):
        return mask
    return torch.empty_like(weight).copy_(mask)


@torch.no_grad()
def apply_masks(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set pruned weights to zero, in place. Masks are bool, or results of :func:`as_factor`."""
    weights = maskable(network)
    factors = [as_factor(mask, weights[name]) for name, mask in masks.items()]
    torch._foreach_mul_([weights[name] for name in masks], factors)


@contextmanager
def masked(network: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Set pruned weights to zero inside this context, and restore all maskable weights exactly afterwards.

    Raises:
        ValueError: if the masks do not fit the network.
    """
    check_masks(network, masks)
    before = {name: weight.clone() for name, weight in maskable(network).items()}
    apply_masks(network, masks)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in maskable(network).items():
                weight.copy_(before[name])


def agreed(masks: WeightMasks) -> WeightMasks:
    """Return the first process's masks in all processes. A single process keeps its masks.

    Ranking is deterministic on one machine, but different models of GPUs may round nearly equal scores differently.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return masks
    sent = {name: mask.to(torch.uint8) for name, mask in masks.items()}
    for mask in sent.values():
        torch.distributed.broadcast(mask, src=0)
    return {name: mask.bool() for name, mask in sent.items()}


def attach_masks(state: TrainState, masks: Mapping[str, Tensor]) -> None:
    """Prune a training state and keep it pruned: weights, averages, and the optimizer's moments.

    Gradients of pruned weights become zero, so that they count neither in the clipping norm nor in the moments. After
    every optimizer step, pruned weights are set to exact zero, regardless of momentum and weight decay. The masks
    replace those that were attached before.

    Masks are stored as 0 and 1 in the type of the weights, because multiplication by bool is about 25 times slower on a
    CPU. A step costs two more multiplications per weight, which is negligible.

    Raises:
        ValueError: if the masks do not fit the network. Then nothing has changed.
    """
    check_masks(state.network, masks)
    parameters = {name: parameter for name, parameter in state.network.named_parameters() if name in masks}
    factors = {name: as_factor(masks[name], parameter.detach()) for name, parameter in parameters.items()}
    apply_masks(state.network, factors)
    state.ema.mask(factors)
    for handle in _HOOKS.pop(state.optimizer, []):
        handle.remove()
    handles: list[RemovableHandle] = []
    for name, parameter in parameters.items():
        handles.append(parameter.register_hook(lambda gradient, factor=factors[name]: gradient * factor))
        for moment in state.optimizer.state.get(parameter, {}).values():
            if moment.shape == parameter.shape:
                moment.mul_(factors[name])
    weights: list[Tensor] = list(parameters.values())
    held = [factors[name] for name in parameters]

    @torch.no_grad()
    def hold(*_: object) -> None:
        torch._foreach_mul_(weights, held)

    handles.append(state.optimizer.register_step_post_hook(hold))
    _HOOKS[state.optimizer] = handles
    state.revision += 1


def hold_masks(state: TrainState, masks: WeightMasks) -> None:
    """Attach masks, move them to the network's device, and store them in every later checkpoint.

    Raises:
        ValueError: if the masks do not fit the network. Then nothing has changed.
    """
    attach_masks(state, masks)
    device = next(state.network.parameters()).device
    state.extra_parts[MASKS_PART] = {name: mask.to(device) for name, mask in masks.items()}


def held_masks(state: TrainState) -> WeightMasks | None:
    """Return the masks of a state, or None."""
    return state.extra_parts.get(MASKS_PART)
