"""Strategies: pure functions that choose which weights to prune. Pruned weights stay pruned.

A strategy is ``(weights, masks, fraction) -> masks``. All except the N:M pattern rank weights by a score and prune the
lowest: magnitudes, random numbers, or scores of :mod:`pruning.masks.saliency`.
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
"""The masks so far; None: nothing is pruned."""

MaskStrategy = Callable[[Mapping[str, Tensor], Masks, float], WeightMasks]
"""Maps maskable weights by name, the masks so far, and the share of all weights to prune, in [0, 1), to new masks.
Exactly ``round(fraction * count)`` weights are pruned in the result, or more if more were pruned before. Ties are
broken by position. Arguments do not change. The result is on the weights' device."""


def keep_highest(scores: Mapping[str, Tensor], masks: Masks, count: int) -> WeightMasks:
    """Keep the ``count`` highest scores among all weights that are not pruned yet; of equal scores, the last.

    Args:
        scores: scores by name of the weight, of any order of magnitude, without NaN.
        masks: masks so far, which must leave at least ``count`` weights, or None.
    """
    flat = torch.cat([score.detach().flatten() for score in scores.values()])
    if masks is not None:
        gone = torch.cat([~masks[name].to(flat.device).flatten() for name in scores])
        flat = flat.masked_fill(gone, -torch.inf)
    pruned = flat.numel() - count
    keep = torch.ones_like(flat, dtype=torch.bool)
    if pruned:
        # The highest score to prune. kthvalue has no deterministic algorithm on a GPU.
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
    """Rank each layer separately (see :data:`MaskStrategy`). A profile determines how much each layer keeps.

    Args:
        scores: scores by name of the weight.
        masks: masks so far, or None.
        fraction: share of all weights that is pruned in the result, exact to one weight.
        shares: the amount that each layer keeps relative to the others (:mod:`pruning.masks.budgets`).
    """
    alive = _alive(scores, masks)
    total = sum(score.numel() for score in scores.values())
    kept = allot(min(sum(alive.values()), total - round(fraction * total)), shares(scores), alive)
    chosen: WeightMasks = {}
    for name, score in scores.items():
        chosen |= keep_highest({name: score}, None if masks is None else {name: masks[name]}, kept[name])
    return chosen


def _alive(scores: Mapping[str, Tensor], masks: Masks) -> dict[str, int]:
    """Return the number of weights of each layer that are not pruned yet."""
    return {name: score.numel() if masks is None else int(masks[name].sum()) for name, score in scores.items()}


def magnitudes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of magnitude pruning (Han et al. 2015; Frankle & Carbin 2019)."""
    return {name: weight.detach().abs() for name, weight in weights.items()}


def global_magnitude(weights: Mapping[str, Tensor], masks: Masks, fraction: float) -> WeightMasks:
    """Prune the smallest weights of the whole network.

    Layers that start at zero (the last of each branch) are pruned completely if they had few steps to grow, and at 95%
    sparsity small networks lose whole layers. Ranking by layer avoids this.
    """
    return rank_together(magnitudes(weights), masks, fraction)


def layer_magnitude(shares: Shares) -> MaskStrategy:
    """Return the strategy that prunes the smallest weights of each layer separately."""

    def strategy(weights: Mapping[str, Tensor], masks: Masks, fraction: float) -> WeightMasks:
        return rank_by_layer(magnitudes(weights), masks, fraction, shares)

    return strategy


def random_scores(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a random number per weight, drawn layer by layer, in order. A seed gives the same on every device."""
    source = generator(seed, Purpose.PRUNE)
    return {
        name: torch.rand(weight.shape, generator=source, dtype=torch.float64).to(weight.device)
        for name, weight in weights.items()
    }


def random_weights(seed: int, shares: Shares | None = None) -> MaskStrategy:
    """Return the strategy that prunes random weights: of the whole network, or of each layer by a profile."""

    def strategy(weights: Mapping[str, Tensor], masks: Masks, fraction: float) -> WeightMasks:
        rank = rank_together if shares is None else partial(rank_by_layer, shares=shares)
        return rank(random_scores(weights, seed), masks, fraction)

    return strategy


def n_of_m(n: int, m: int) -> MaskStrategy:
    """Return the strategy that keeps the ``n`` largest of every ``m`` neighbouring weights.

    Sparse tensor cores of GPUs can skip the zeros of 2 of 4 (Mishra et al. 2021). No kernel here does: a network with
    this pattern takes as long as the dense one. The pattern shows what it costs in quality.

    Neighbours are input channels of one output channel (and one kernel position), as sparse matrix products need them.
    A layer whose number of inputs is not a multiple of ``m``, such as the first, stays dense. The pattern determines
    the fraction, so the strategy ignores its argument.
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
