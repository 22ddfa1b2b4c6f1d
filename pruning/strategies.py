"""Strategies: pure functions that choose which weights to prune. What is pruned stays pruned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pruning.masks import WeightMasks


def global_magnitude(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None, fraction: float) -> WeightMasks:
    """Prune the smallest weights of the whole network (Han et al. 2015; Frankle & Carbin 2019).

    Args:
        weights: the maskable weights by name.
        masks: what is pruned already, or None.
        fraction: share of all maskable weights, in [0, 1), that is pruned in the result: exactly
            ``round(fraction * count)`` weights, ties broken by position. If more are pruned already, they stay so.

    Returns:
        New masks, on the weights' device.
    """
    scores = torch.cat([weight.detach().abs().float().flatten() for weight in weights.values()])
    if masks is not None:
        pruned = torch.cat([~masks[name].to(scores.device).flatten() for name in weights])
        scores = scores.masked_fill(pruned, -1.0)
        count = max(round(fraction * scores.numel()), int(pruned.sum()))
    else:
        count = round(fraction * scores.numel())
    keep = torch.ones_like(scores, dtype=torch.bool)
    if count:
        threshold = scores.kthvalue(count).values
        keep = scores >= threshold
        ties = (scores == threshold).nonzero()[:, 0]
        keep[ties[: count - int((~keep).sum())]] = False
    sizes = [weight.numel() for weight in weights.values()]
    return {
        name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), keep.split(sizes), strict=True)
    }


def layer_magnitude(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None, fraction: float) -> WeightMasks:
    """Prune the smallest weights of each layer by themselves, an equal share of each.

    Arguments and result as of :func:`global_magnitude`; the count is exact in each layer.
    """
    chosen: WeightMasks = {}
    for name, weight in weights.items():
        chosen |= global_magnitude({name: weight}, masks and {name: masks[name]}, fraction)
    return chosen
