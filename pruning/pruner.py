"""Prune a training state as a configuration asks, and keep it pruned when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import CoreConfig
from diffusion_core.trainer import TrainState
from pruning.calibration import Calibration
from pruning.choice import choose_masks
from pruning.config import LISTENS_TO, PruneConfig
from pruning.cost import Cost, count_cost
from pruning.masks import MASKS_PART, agreed, attach_masks, empty_layers, held_masks, hold_masks, sparsity
from pruning.structural import prune_channels

RECORD_KEY = "pruning"
"""Where checkpoints keep the records of the prunings, oldest first."""

REPORTED = frozenset({"method", "step", "keep"})
"""Knobs that a record names for every method."""


@dataclass(frozen=True)
class PruneReport:
    """What a pruning did; plain values, kept in every later checkpoint.

    Attributes:
        method: ``prune.method``.
        step: optimizer steps before it.
        keep: ``prune.keep``, the share that was to stay.
        sparsity: share of the maskable weights (masks) or of all parameters (structured) that went.
        before: cost of the network as it was.
        after: cost of the pruned one.
        details: what the method needs besides to be done again, as plain JSON.
    """

    method: str
    step: int
    keep: float
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
    heard = {name: getattr(prune, name) for name in sorted(LISTENS_TO[prune.method]) if name not in REPORTED}
    return Pruned(sparsity(masks), heard | {"empty_layers": empty_layers(masks)})


def prune_structure(
    state: TrainState, config: CoreConfig, prune: PruneConfig, _calibration: Calibration | None
) -> Pruned:
    """Put a smaller network in place of the network, with fresh averages and a fresh optimizer."""
    params = count_cost(state.network).params
    smaller = TrainState.start(prune_channels(state.network, 1.0 - prune.keep), config)
    state.network, state.ema, state.optimizer = smaller.network, smaller.ema, smaller.optimizer
    return Pruned(1.0 - count_cost(state.network).params / params)


PRUNERS: dict[str, Pruner] = {
    **dict.fromkeys(("magnitude", "random", "snip", "synflow", "gradual", "n_of_m"), prune_weights),
    "structured": prune_structure,
}
"""The pruner of each ``prune.method``."""


def prune_state(
    state: TrainState, config: CoreConfig, prune: PruneConfig, calibration: Calibration | None = None
) -> PruneReport:
    """Prune a training state, in place, and add a record of it to the state's."""
    before = count_cost(state.network)
    pruned = PRUNERS[prune.method](state, config, prune, calibration)
    report = PruneReport(
        prune.method, state.step, prune.keep, pruned.sparsity, before, count_cost(state.network), pruned.details
    )
    state.extra_metadata[RECORD_KEY] = [*records(state), asdict(report)]
    return report


def records(state: TrainState) -> list[dict[str, Any]]:
    """What was done to a state by earlier prunings, oldest first."""
    return list(state.extra_metadata.get(RECORD_KEY, []))


def is_pruned(state: TrainState) -> bool:
    """Whether a state was pruned already."""
    return bool(records(state))


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
