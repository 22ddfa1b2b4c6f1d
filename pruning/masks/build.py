"""Build masks from the knobs of pruning, with the strategy that ``prune.method`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet
from pruning.blocks import block_shares
from pruning.calibration import Calibration
from pruning.config import PruneConfig
from pruning.masks.activations import input_norms, rank_by_output, wanda_scores
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
from pruning.registries import MASK_STRATEGIES


@dataclass(frozen=True)
class MaskRequest:
    """The input of a mask strategy.

    Attributes:
        network: the network with its current weights.
        masks: the masks so far, or None. Pruned weights stay pruned.
        seed: seed of random choices.
        prune: the knobs of pruning.
        calibration: training images, for a strategy that needs them.
        progress: the current share of the final sparsity, in [0, 1] (gradual pruning).
    """

    network: UNet
    masks: Masks
    seed: int
    prune: PruneConfig
    calibration: Calibration | None = None
    progress: float = 1.0


@dataclass(frozen=True)
class MaskRecord:
    """A mask strategy that a user can select.

    Attributes:
        choose: returns the masks of a request. It is pure, and returns the same in every process.
        help: what it does, and its source.
        knobs: names of the knobs ``prune.*`` that it uses, besides ``method`` and ``step``.
        needs_images: whether it needs training images.
        at_start: whether it prunes at initialisation unless ``prune.step`` is set.
        gradual: whether it prunes in many small steps, up to ``prune.until``.
        regrows: whether weights are dropped and grown afterwards, up to ``prune.until``.
    """

    choose: Callable[[MaskRequest], WeightMasks]
    help: str
    knobs: frozenset[str] = frozenset({"keep"})
    needs_images: bool = False
    at_start: bool = False
    gradual: bool = False
    regrows: bool = False


def choose_masks(
    network: UNet,
    masks: Masks,
    seed: int,
    prune: PruneConfig,
    calibration: Calibration | None = None,
    progress: float = 1.0,
) -> WeightMasks:
    """Return the masks of ``prune.method`` (see :class:`MaskRequest`). Pure, and the same in every process."""
    record: MaskRecord = MASK_STRATEGIES[prune.method]
    return record.choose(MaskRequest(network, masks, seed, prune, calibration, progress))


def _by_pattern(request: MaskRequest) -> WeightMasks:
    n, m = map(int, request.prune.pattern.split(":"))
    return n_of_m(n, m)(maskable(request.network), request.masks, 0.0)


def _by_snip(request: MaskRequest) -> WeightMasks:
    assert request.calibration is not None  # It needs images.
    ready = stand_in(request.network, request.seed).eval()
    gradients = request.calibration.gradients(ready, request.prune.calibration_batches)
    return rank_together(snip_scores(maskable(ready), gradients), request.masks, 1.0 - request.prune.keep)


def _by_synflow(request: MaskRequest) -> WeightMasks:
    return synflow_masks(stand_in(request.network, request.seed), request.masks, 1.0 - request.prune.keep)


def _by_wanda(request: MaskRequest) -> WeightMasks:
    assert request.calibration is not None  # It needs images.
    norms = input_norms(request.network, request.calibration, request.prune.calibration_batches)
    scores = wanda_scores(maskable(request.network), norms)
    return rank_by_output(scores, request.masks, 1.0 - request.prune.keep)


def _by_magnitude(request: MaskRequest) -> WeightMasks:
    return _ranked(request, by_magnitude)


def _at_random(request: MaskRequest) -> WeightMasks:
    return _ranked(request, lambda shares: random_weights(request.seed, shares))


def by_magnitude(shares: Shares | None) -> MaskStrategy:
    """Return the strategy that prunes the smallest weights: of the whole network (None), or of each layer by shares."""
    return global_magnitude if shares is None else layer_magnitude(shares)


def _ranked(request: MaskRequest, strategy: Callable[[Shares | None], MaskStrategy]) -> WeightMasks:
    """Rank weights together or by layer, according to ``prune.scope`` and ``prune.profile``."""
    prune, weights = request.prune, maskable(request.network)
    shares = layer_shares(prune, len(request.network.down), request.progress)
    fraction = (1.0 - prune.keep) * request.progress
    if prune.scope == "layer" and prune.profile == "blocks":
        assert shares is not None
        fraction = 1.0 - sum(shares(weights).values()) / sum(weight.numel() for weight in weights.values())
    return strategy(shares)(weights, request.masks, fraction)


_RANKED = frozenset({"keep", "scope", "profile", "block_keep"})
MASK_STRATEGIES["magnitude"] = MaskRecord(_by_magnitude, "masks: prune the smallest weights", _RANKED)
MASK_STRATEGIES["random"] = MaskRecord(_at_random, "masks: prune random weights, a control", _RANKED)
MASK_STRATEGIES["snip"] = MaskRecord(
    _by_snip,
    "masks: rank by gradients at initialisation (Lee et al. 2019)",
    frozenset({"keep", "calibration_batches"}),
    needs_images=True,
    at_start=True,
)
MASK_STRATEGIES["synflow"] = MaskRecord(
    _by_synflow, "masks: rank by synaptic flow at initialisation (Tanaka et al. 2020)", at_start=True
)
MASK_STRATEGIES["wanda"] = MaskRecord(
    _by_wanda,
    "masks: rank the weights of each output by magnitude times the norm of the input (Sun et al. 2023)",
    frozenset({"keep", "calibration_batches"}),
    needs_images=True,
)
MASK_STRATEGIES["gradual"] = MaskRecord(
    _by_magnitude,
    "masks: prune the smallest weights in many small steps (Zhu & Gupta 2017)",
    _RANKED | {"until", "interval"},
    gradual=True,
)
MASK_STRATEGIES["rigl"] = MaskRecord(
    _at_random,
    "masks: start from random ones, then drop by magnitude and grow by gradient (Evci et al. 2020)",
    _RANKED | {"until", "interval", "regrow"},
    needs_images=True,
    at_start=True,
    regrows=True,
)
MASK_STRATEGIES["n_of_m"] = MaskRecord(
    _by_pattern,
    "masks: N:M sparsity, a pattern that GPUs can use (Mishra et al. 2021); nothing here does",
    frozenset({"pattern"}),
)


def layer_shares(prune: PruneConfig, levels: int, progress: float = 1.0) -> Shares | None:
    """Return the amount that each layer keeps relative to the others, or None if all weights are ranked together.

    Args:
        prune: the knobs of pruning.
        levels: number of resolutions of the network.
        progress: the current share of the final sparsity, in [0, 1].
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
