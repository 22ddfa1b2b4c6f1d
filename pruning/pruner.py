"""Prune a training state as a configuration asks, and keep it pruned when it is resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import CoreConfig
from diffusion_core.model.cost import Cost, count_cost
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet
from diffusion_core.training.trainer import TrainState
from pruning.calibration import Calibration
from pruning.channels.removal import Removal, prune_channels, remove
from pruning.config import PruneConfig, listens_to
from pruning.masks.build import choose_masks
from pruning.masks.mask import MASKS_PART, WeightMasks, agreed, empty_layers, held_masks, hold_masks, sparsity

RECORD_KEY = "pruning"
"""Where checkpoints keep the records of the prunings, oldest first."""

INHERITED_KEY = "inherited_prunings"
"""Where they keep how many of those the run found in what it was started from."""


@dataclass(frozen=True)
class PruneReport:
    """What a pruning did; plain values, kept in every later checkpoint.

    Attributes:
        method: ``prune.method``.
        step: optimizer steps before it.
        knobs: those of ``prune.*`` that the method listens to.
        seed: what was random followed from it.
        sparsity: share of the maskable weights (masks) or of all parameters (structured) that went.
        before: cost of the network as it was.
        after: cost of the pruned one.
        details: what the method needs besides to be done again, as plain JSON.
    """

    method: str
    step: int
    knobs: dict[str, Any]
    seed: int
    sparsity: float
    before: Cost
    after: Cost
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pruned:
    """What a pruner hands back: how much went (see :class:`PruneReport`), and what doing it again needs."""

    sparsity: float
    details: dict[str, Any] = field(default_factory=dict)


Pruner = Callable[[TrainState, CoreConfig, PruneConfig, Calibration | None], Pruned]
"""Prunes a training state in place. What it draws follows from ``config.seed``; gradients come from calibration."""


def prune_weights(state: TrainState, config: CoreConfig, prune: PruneConfig, calibration: Calibration | None) -> Pruned:
    """Mask weights; those that are pruned stay zero in the network, its averages and the optimizer."""
    masks = agreed(choose_masks(state.network, held_masks(state), config, prune, calibration))
    hold_masks(state, masks)
    return Pruned(sparsity(masks), {"empty_layers": empty_layers(masks)})


def prune_structure(
    state: TrainState, config: CoreConfig, prune: PruneConfig, calibration: Calibration | None
) -> Pruned:
    """Put a smaller network in place of the network, with fresh averages and a fresh optimizer.

    Weights that are masked already stay so, where they stay at all.
    """
    params = count_cost(state.network).params
    network, removal = prune_channels(state.network, prune, config.seed, calibration, config.log.progress)
    masks = held_masks(state)
    if masks is not None:
        masks = smaller_masks(state.network, masks, removal)
    smaller = TrainState.start(network, config)
    state.network, state.ema, state.optimizer = smaller.network, smaller.ema, smaller.optimizer
    if masks is not None:
        hold_masks(state, masks)
    return Pruned(1.0 - count_cost(state.network).params / params, asdict(removal))


def smaller_masks(network: UNet, masks: WeightMasks, removal: Removal) -> WeightMasks:
    """What is left of masks once channels are removed: the masks go through it in place of the weights."""
    carrier = copy.deepcopy(network)
    carrier.load_state_dict({name: mask.to(torch.float32) for name, mask in masks.items()}, strict=False)
    return {name: weight != 0 for name, weight in maskable(remove(carrier, replace(removal, redrawn=None))).items()}


def prune_state(
    state: TrainState, config: CoreConfig, prune: PruneConfig, calibration: Calibration | None = None
) -> PruneReport:
    """Prune a training state, in place, and add a record of it to the state's."""
    before = count_cost(state.network)
    pruner = prune_structure if prune.method == "structured" else prune_weights
    pruned = pruner(state, config, prune, calibration)
    report = PruneReport(
        method=prune.method,
        step=state.step,
        knobs=heard_knobs(prune),
        seed=config.seed,
        sparsity=pruned.sparsity,
        before=before,
        after=count_cost(state.network),
        details=pruned.details,
    )
    keep_record(state, report)
    return report


def heard_knobs(prune: PruneConfig) -> dict[str, Any]:
    """The knobs that the method listens to, as JSON."""
    heard = listens_to(prune.method)
    return {name: value for name, value in prune.model_dump(mode="json").items() if name in heard}


def keep_record(state: TrainState, report: PruneReport) -> None:
    """Add what a pruning did to the records that every later checkpoint holds."""
    state.extra_metadata[RECORD_KEY] = [*records(state), asdict(report)]


def records(state: TrainState) -> list[dict[str, Any]]:
    """What was done to a state by earlier prunings, oldest first."""
    return list(state.extra_metadata.get(RECORD_KEY, []))


def is_pruned(state: TrainState) -> bool:
    """Whether a state was pruned since it was started, from nothing or from a checkpoint."""
    return len(records(state)) > state.extra_metadata.get(INHERITED_KEY, 0)


def inherit(state: TrainState, earlier: Sequence[Mapping[str, Any]], masks: Mapping[str, Tensor] | None) -> None:
    """Go on from a pruned network: with its records, and with the weights that are masked in it at zero for good.

    Args:
        state: started from the weights of a checkpoint.
        earlier: the checkpoint's records.
        masks: its masks, or None where it has none or they are not at hand: then the zeros among the weights tell.

    Raises:
        ValueError: if the masks are not those of the network.
    """
    if earlier:
        state.extra_metadata |= {RECORD_KEY: list(earlier), INHERITED_KEY: len(earlier)}
    if any(record["method"] != "structured" for record in earlier):
        if masks is None:
            masks = {name: weight != 0 for name, weight in maskable(state.network).items()}
        own = {name: mask.bool() for name, mask in masks.items()}
        hold_masks(state, own)


def resume_pruning(state: TrainState) -> None:
    """After a restore: hold pruned weights at zero again, if the state was pruned by masks.

    Raises:
        CheckpointError: if the masks are not those of the network.
    """
    if MASKS_PART in state.extra_parts:
        try:
            hold_masks(state, {name: mask.bool() for name, mask in state.extra_parts[MASKS_PART].items()})
        except ValueError as error:
            raise CheckpointError(f"cannot resume: {error}") from None
