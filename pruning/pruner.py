"""Prune a training state with the configured method, and keep it pruned after resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import CoreConfig
from diffusion_core.distributed import gather_objects
from diffusion_core.model.cost import Cost, count_cost
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet
from diffusion_core.training.trainer import TrainState
from pruning.calibration import Calibration
from pruning.channels.removal import Removal, remove
from pruning.config import PruneConfig, listens_to
from pruning.depth.removal import prune_network
from pruning.masks.build import choose_masks
from pruning.masks.mask import MASKS_PART, WeightMasks, agreed, empty_layers, held_masks, hold_masks, sparsity

RECORD_KEY = "pruning"
"""Key of a checkpoint's metadata for the records of its prunings, oldest first."""

INHERITED_KEY = "inherited_prunings"
"""Key of a checkpoint's metadata for the number of records from before its run."""


@dataclass(frozen=True)
class PruneReport:
    """A record of a pruning: plain values, stored in every later checkpoint.

    Attributes:
        method: ``prune.method``.
        step: optimizer steps before it.
        knobs: the knobs ``prune.*`` that the method uses.
        seed: seed of all random choices.
        sparsity: removed share of the maskable weights (masks) or of all parameters (structured), in [0, 1].
        before: cost of the network before it.
        after: cost of the network after it.
        details: what else repeating it needs, as JSON.
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
    """The result of a pruner. For the attributes, see :class:`PruneReport`."""

    sparsity: float
    details: dict[str, Any] = field(default_factory=dict)


Pruner = Callable[[TrainState, CoreConfig, PruneConfig, Calibration | None], Pruned]
"""Prunes a training state in place. ``config.seed`` decides what is random; calibration provides gradients."""


def prune_weights(state: TrainState, config: CoreConfig, prune: PruneConfig, calibration: Calibration | None) -> Pruned:
    """Mask weights. Pruned weights stay zero in the network, its averages and the optimizer."""
    masks = agreed(choose_masks(state.network, held_masks(state), config.seed, prune, calibration))
    hold_masks(state, masks)
    return Pruned(sparsity(masks), {"empty_layers": empty_layers(masks)})


def prune_structure(
    state: TrainState, config: CoreConfig, prune: PruneConfig, calibration: Calibration | None
) -> Pruned:
    """Replace the network by a smaller one, with new averages and a new optimizer.

    Masked weights that remain stay masked. All processes remove what the first one chose: other models of GPUs may
    round nearly equal scores differently, and each measures latencies of its own.
    """
    params = count_cost(state.network).params
    network, chosen = prune_network(state.network, prune, config.seed, calibration, config.log.progress)
    removal = gather_objects(chosen)[0]
    if removal != chosen:
        network = remove(state.network, removal)
    masks = held_masks(state)
    if masks is not None:
        masks = smaller_masks(state.network, masks, removal)
    smaller = TrainState.start(network, config.train, config.ema)
    state.network, state.ema, state.optimizer = smaller.network, smaller.ema, smaller.optimizer
    if masks is not None:
        hold_masks(state, masks)
    return Pruned(1.0 - count_cost(state.network).params / params, asdict(removal))


def smaller_masks(network: UNet, masks: WeightMasks, removal: Removal) -> WeightMasks:
    """Return masks without what was removed, by removing them from a network whose weights are the masks."""
    carrier = copy.deepcopy(network)
    carrier.load_state_dict({name: mask.to(torch.float32) for name, mask in masks.items()}, strict=False)
    return {name: weight != 0 for name, weight in maskable(remove(carrier, replace(removal, redrawn=None))).items()}


def prune_state(
    state: TrainState, config: CoreConfig, prune: PruneConfig, calibration: Calibration | None = None
) -> PruneReport:
    """Prune a training state in place, and add a record of it."""
    before = count_cost(state.network, held_masks(state))
    pruner = prune_structure if prune.method == "structured" else prune_weights
    pruned = pruner(state, config, prune, calibration)
    report = PruneReport(
        method=prune.method,
        step=state.step,
        knobs=heard_knobs(prune),
        seed=config.seed,
        sparsity=pruned.sparsity,
        before=before,
        after=count_cost(state.network, held_masks(state)),
        details=pruned.details,
    )
    keep_record(state, report)
    return report


def heard_knobs(prune: PruneConfig) -> dict[str, Any]:
    """Return the knobs that the method uses, as JSON."""
    heard = listens_to(prune.method)
    return {name: value for name, value in prune.model_dump(mode="json").items() if name in heard}


def keep_record(state: TrainState, report: PruneReport) -> None:
    """Add a record of a pruning, which every later checkpoint stores."""
    state.extra_metadata[RECORD_KEY] = [*records(state), asdict(report)]


def records(state: TrainState) -> list[dict[str, Any]]:
    """Return the records of a state's prunings, oldest first."""
    return list(state.extra_metadata.get(RECORD_KEY, []))


def is_pruned(state: TrainState) -> bool:
    """Return whether a state was pruned in this run. Prunings of the checkpoint that it started from do not count."""
    return len(records(state)) > state.extra_metadata.get(INHERITED_KEY, 0)


def inherit(state: TrainState, earlier: Sequence[Mapping[str, Any]], masks: Mapping[str, Tensor] | None) -> None:
    """Continue from a pruned network: take over its records, and keep its masked weights at zero.

    Args:
        state: started from the weights of a checkpoint.
        earlier: the checkpoint's records.
        masks: the checkpoint's masks; None: derive them from the zeros among the weights.

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
    """Keep pruned weights at zero after a restore, if the state was pruned by masks.

    Raises:
        CheckpointError: if the masks are not those of the network.
    """
    if MASKS_PART in state.extra_parts:
        try:
            hold_masks(state, {name: mask.bool() for name, mask in state.extra_parts[MASKS_PART].items()})
        except ValueError as error:
            raise CheckpointError(f"cannot resume: {error}") from None
