"""Strategies: pure functions that choose which weights to prune. What is pruned stays pruned.

A strategy is ``(weights, masks, fraction) -> masks``. All but the pattern N:M rank weights by a score, of which the
lowest go: their magnitude, a random number, or what :mod:`pruning.masks.saliency` measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from diffusion_core.randomness import Purpose, generator
from pruning.masks.budgets import Shares, allot
from pruning.masks.mask import WeightMasks

Masks = Mapping[str, Tensor] | None
"""What is pruned already, or None for nothing."""

MaskStrategy = Callable[[Mapping[str, Tensor], Masks, float], WeightMasks]
"""Maskable weights by name, what is pruned already, and the share of all of them, in [0, 1), that is pruned in the
result: exactly ``round(fraction * count)`` weights, ties broken by position. What is pruned already stays so, also
where that is more. Nothing that is passed in changes; the result is on the weights' device."""


def keep_highest(scores: Mapping[str, Tensor], masks: Masks, count: int) -> WeightMasks:
    """Keep the ``count`` highest scores of all, those pruned already left out; of equal ones the last.

    Args:
        scores: by name of the weight; any order of magnitude, but no NaN.
        masks: what is pruned already; at least ``count`` weights must be left.
    """
    flat = torch.cat([score.detach().flatten() for score in scores.values()])
    if masks is not None:
        gone = torch.cat([~masks[name].to(flat.device).flatten() for name in scores])
        flat = flat.masked_fill(gone, -torch.inf)
    pruned = flat.numel() - count
    keep = torch.ones_like(flat, dtype=torch.bool)
    if pruned:
        # The highest score that goes; kthvalue has no deterministic algorithm on a GPU.
        threshold = flat.topk(pruned, largest=False, sorted=False).values.max()
        keep = flat >= threshold
        ties = (flat == threshold).nonzero()[:, 0]
        keep[ties[: pruned - int((~keep).sum())]] = False
    sizes = [score.numel() for score in scores.values()]
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), keep.split(sizes), strict=True)}


def rank_together(scores: Mapping[str, Tensor], masks: Masks, fraction: float) -> WeightMasks:
    """Rank all weights together (see :data:`MaskStrategy`)."""
    alive = sum(_alive(scores, masks).values())
    total = sum(score.numel() for score in scores.values())
    return keep_highest(scores, masks, min(alive, total - round(fraction * total)))


def rank_by_layer(scores: Mapping[str, Tensor], masks: Masks, fraction: float, shares: Shares) -> WeightMasks:
    """Rank each layer by itself (see :data:`MaskStrategy`); how much of each stays is said by a profile.

    Args:
        scores: by name of the weight.
        masks: what is pruned already, or None.
        fraction: share of all weights that is pruned in the result, exact to one weight.
        shares: what each layer is to keep, in proportion (:mod:`pruning.masks.budgets`).
    """
    alive = _alive(scores, masks)
    total = sum(score.numel() for score in scores.values())
    kept = allot(min(sum(alive.values()), total - round(fraction * total)), shares(scores), alive)
    chosen: WeightMasks = {}
    for name, score in scores.items():
        chosen |= keep_highest({name: score}, None if masks is None else {name: masks[name]}, kept[name])
    return chosen


def _alive(scores: Mapping[str, Tensor], masks: Masks) -> dict[str, int]:
    """How many weights of each layer are not pruned yet."""
    return {name: score.numel() if masks is None else int(masks[name].sum()) for name, score in scores.items()}


def magnitudes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The score of magnitude pruning (Han et al. 2015; Frankle & Carbin 2019)."""
    return {name: weight.detach().abs() for name, weight in weights.items()}


def global_magnitude(weights: Mapping[str, Tensor], masks: Masks, fraction: float) -> WeightMasks:
    """Prune the smallest weights of the whole network.

    Layers that start at zero (the last of each branch) go whole if they had few steps to grow, and at 95% whole layers
    collapse in small networks; by layer they do not.
    """
    return rank_together(magnitudes(weights), masks, fraction)


def layer_magnitude(shares: Shares) -> MaskStrategy:
    """Prune the smallest weights of each layer by themselves."""

    def strategy(weights: Mapping[str, Tensor], masks: Masks, fraction: float) -> WeightMasks:
        return rank_by_layer(magnitudes(weights), masks, fraction, shares)

    return strategy


def random_scores(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A random number a weight, the same for the same seed on every device; drawn layer by layer, in order."""
    source = generator(seed, Purpose.PRUNE)
    return {
        name: torch.rand(weight.shape, generator=source, dtype=torch.float64).to(weight.device)
        for name, weight in weights.items()
    }


def random_weights(seed: int, shares: Shares | None = None) -> MaskStrategy:
    """Prune weights at random: of the whole network, or in each layer what a profile says."""

    def strategy(weights: Mapping[str, Tensor], masks: Masks, fraction: float) -> WeightMasks:
        rank = rank_together if shares is None else partial(rank_by_layer, shares=shares)
        return rank(random_scores(weights, seed), masks, fraction)

    return strategy


def n_of_m(n: int, m: int) -> MaskStrategy:
    """Keep the ``n`` largest of every ``m`` neighbours (Mishra et al. 2021: 2 of 4, which GPUs multiply faster).

    Neighbours are input channels of one output channel (and one position of the kernel), as sparse matrix products need
    them. A layer whose inputs are no multiple of ``m``, such as the first, stays dense. The fraction follows from the
    pattern, so the strategy's argument is not looked at.
    """

    def strategy(weights: Mapping[str, Tensor], masks: Masks, _fraction: float) -> WeightMasks:
        chosen: WeightMasks = {}
        for name, score in magnitudes(weights).items():
            old = torch.ones_like(score, dtype=torch.bool) if masks is None else masks[name].to(score.device)
            if score.shape[1] % m:
                chosen[name] = old.clone()
                continue
            last = score.masked_fill(~old, -1.0).movedim(1, -1)  # Input channels side by side.
            groups = last.reshape(-1, m)
            keep = torch.zeros_like(groups, dtype=torch.bool)
            keep.scatter_(1, groups.topk(n, dim=1).indices, True)
            chosen[name] = keep.view(last.shape).movedim(-1, 1).contiguous() & old
        return chosen

    return strategy
