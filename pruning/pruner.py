"""Prune a training state as a configuration asks, and keep it pruned when it is resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import CoreConfig
from diffusion_core.trainer import TrainState
from pruning.config import PruneConfig
from pruning.cost import Cost, count_cost
from pruning.masks import attach_masks, maskable, sparsity
from pruning.strategies import global_magnitude
from pruning.structural import prune_channels

MASKS_PART = "masks"
RECORD_KEY = "pruning"


@dataclass(frozen=True)
class PruneReport:
    """What a pruning did; plain values, kept in every later checkpoint.

    Attributes:
        method: ``prune.method``.
        step: optimizer steps before it.
        sparsity: share of the maskable weights (magnitude) or of all parameters (structured) that went.
        before: cost of the dense network.
        after: cost of the pruned one.
    """

    method: str
    step: int
    sparsity: float
    before: Cost
    after: Cost


def prune_state(state: TrainState, config: CoreConfig, prune: PruneConfig) -> PruneReport:
    """Prune a training state, in place.

    Masks keep the network, its average and the optimizer, with pruned weights at zero for good. Structured pruning puts
    a smaller network in their place, with a fresh average and a fresh optimizer.
    """
    before = count_cost(state.network)
    if prune.method == "magnitude":
        masks = global_magnitude(maskable(state.network), None, prune.ratio)
        attach_masks(state, masks)
        state.extra_parts[MASKS_PART] = dict(masks)
        after = count_cost(state.network)
        achieved = sparsity(masks)
    else:
        smaller = TrainState.start(prune_channels(state.network, prune.ratio), config)
        state.network, state.ema, state.optimizer = smaller.network, smaller.ema, smaller.optimizer
        after = count_cost(state.network)
        achieved = 1.0 - after.params / before.params
    report = PruneReport(prune.method, state.step, achieved, before, after)
    state.extra_metadata[RECORD_KEY] = asdict(report)
    return report


def resume_pruning(state: TrainState) -> None:
    """After a restore: hold pruned weights at zero again, if the state was pruned by masks.

    Raises:
        CheckpointError: if the masks are not those of the network.
    """
    if MASKS_PART in state.extra_parts:
        try:
            attach_masks(state, {name: mask.bool() for name, mask in state.extra_parts[MASKS_PART].items()})
        except ValueError as error:
            raise CheckpointError(f"cannot resume: {error}") from None


def is_pruned(state: TrainState) -> bool:
    """Whether a state was pruned already."""
    return RECORD_KEY in state.extra_metadata
