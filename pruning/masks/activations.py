"""Wanda (Sun et al. 2023): weights ranked by their magnitude times the norm of their input, within each output.

Axes: B batch, C input channels of a layer, O its outputs, K weights of one output, L positions of the output.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet
from pruning.calibration import Calibration
from pruning.masks.budgets import allot
from pruning.masks.mask import WeightMasks
from pruning.masks.strategies import Masks


@torch.no_grad()
def input_norms(network: UNet, calibration: Calibration, batches: int) -> dict[str, Tensor]:
    """Return the L2 norm of the inputs of each weight, ``||X_j||_2``, over all calls of its layer.

    A convolution is a linear layer of patches: X has one row for each position of each image, and one column for each
    weight of an output. Padding counts as zeros.

    Args:
        network: the network; it does not change.
        calibration: noisy training images.
        batches: number of batches.

    Returns:
        Norms by name of the weight, in its shape without the axis of outputs, float64.
    """
    measured = copy.deepcopy(network).eval()
    squares: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(partial(_note, squares, f"{name}.weight"))
        for name, module in measured.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    for index in calibration.indices(batches, "inputs"):
        calibration.noise_error(measured, calibration.draws(index, measured))
    for handle in handles:
        handle.remove()
    return {name: squares[name].view(weight.shape[1:]).sqrt() for name, weight in maskable(network).items()}


def _note(squares: dict[str, Tensor], name: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
    """Add the squares of a layer's inputs to the sums, ``(K,)``."""
    square = inputs[0].detach().double().square()
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        patches_KL = F.unfold(
            square.sum(dim=0, keepdim=True), module.kernel_size, padding=module.padding, stride=module.stride
        )[0]
        total = patches_KL.sum(dim=1)
    else:
        total = square.flatten(0, -2).sum(dim=0)
    squares[name] = squares[name] + total if name in squares else total


def wanda_scores(weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``|W_ij| * ||X_j||_2`` (Sun et al. 2023, eq. 1), float64, by name of the weight."""
    return {name: weight.detach().double().abs() * norms[name] for name, weight in weights.items()}


def rank_by_output(scores: Mapping[str, Tensor], masks: Masks, fraction: float) -> WeightMasks:
    """Rank the weights of each output separately, as Wanda does: every output keeps the same share of its weights.

    Args:
        scores: scores by name of the weight.
        masks: masks so far, or None. Pruned weights stay pruned.
        fraction: share of all weights that is pruned in the result, exact to one weight.
    """
    total = sum(score.numel() for score in scores.values())
    alive = {
        name: torch.ones_like(score, dtype=torch.bool) if masks is None else masks[name].to(score.device)
        for name, score in scores.items()
    }
    most: dict[str, int] = {}
    sizes: dict[str, float] = {}
    for name, stays in alive.items():
        for row, left in enumerate(stays.flatten(1).sum(dim=1).tolist()):
            most[f"{name}#{row}"] = left
            sizes[f"{name}#{row}"] = float(stays[0].numel())
    kept = allot(min(sum(most.values()), total - round(fraction * total)), sizes, most)
    chosen = {}
    for name, score in scores.items():
        count_O1 = torch.tensor([kept[f"{name}#{row}"] for row in range(len(score))], device=score.device)[:, None]
        score_OK = score.masked_fill(~alive[name], -torch.inf).flatten(1)
        rank_OK = score_OK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen[name] = (rank_OK < count_O1).view(score.shape)
    return chosen
