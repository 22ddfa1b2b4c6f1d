"""Which weights a configuration prunes: from its knobs to masks, by the strategy that they name."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion_core.config import CoreConfig
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet
from pruning.blocks import block_shares
from pruning.calibration import Calibration
from pruning.config import PruneConfig
from pruning.masks.budgets import Shares, by_block, erdos_renyi_kernel, uniform
from pruning.masks.mask import WeightMasks
from pruning.masks.saliency import snip_scores, stand_in, synflow_masks
from pruning.masks.strategies import (
    Masks,
    MaskStrategy,
    global_magnitude,
    layer_magnitude,
    n_of_m,
    random_weights,
    rank_together,
)


def choose_masks(
    network: UNet,
    masks: Masks,
    config: CoreConfig,
    prune: PruneConfig,
    calibration: Calibration | None = None,
    progress: float = 1.0,
) -> WeightMasks:
    """The masks that ``prune.method`` asks for; pure, and the same in every process.

    Args:
        network: as it is now.
        masks: what is pruned already, or None; it stays so.
        config: the run's configuration.
        prune: the knobs of pruning.
        calibration: what SNIP measures gradients on.
        progress: share of the way to the final sparsity, in [0, 1] (gradual pruning).
    """
    if prune.method == "n_of_m":
        n, m = map(int, prune.pattern.split(":"))
        return n_of_m(n, m)(maskable(network), masks, 0.0)
    if prune.method == "snip":
        assert calibration is not None  # prune.needs_images
        ready = stand_in(network, config.seed)
        gradients = calibration.gradients(ready, prune.calibration_batches)
        return rank_together(snip_scores(maskable(ready), gradients), masks, 1.0 - prune.keep)
    if prune.method == "synflow":
        return synflow_masks(stand_in(network, config.seed), masks, 1.0 - prune.keep)
    weights = maskable(network)
    levels = len(config.model.channel_multipliers)
    shares = layer_shares(prune, levels, progress)
    fraction = (1.0 - prune.keep) * progress
    if prune.scope == "layer" and prune.profile == "blocks":
        assert shares is not None
        fraction = 1.0 - sum(shares(weights).values()) / sum(weight.numel() for weight in weights.values())
    return strategy(prune, shares, config.seed)(weights, masks, fraction)


def strategy(prune: PruneConfig, shares: Shares | None, seed: int) -> MaskStrategy:
    """How weights are ranked: by magnitude or at random, together or by layer."""
    if prune.method == "random":
        return random_weights(seed, shares)
    return global_magnitude if shares is None else layer_magnitude(shares)


def layer_shares(prune: PruneConfig, levels: int, progress: float = 1.0) -> Shares | None:
    """What each layer keeps, or None where all weights are ranked together.

    Args:
        prune: the knobs of pruning.
        levels: number of resolutions of the network.
        progress: share of the way to the final sparsity, in [0, 1].
    """
    if prune.scope != "layer":
        return None
    if prune.profile == "uniform":
        return uniform
    if prune.profile == "erk":
        return erdos_renyi_kernel

    def on_the_way(keep: float) -> float:
        return 1.0 - (1.0 - keep) * progress

    blocks: Mapping[str, float] = block_shares(prune.block_keep, levels)
    return by_block({name: on_the_way(keep) for name, keep in blocks.items()}, on_the_way(prune.keep))
