"""Lottery tickets: subnetworks found by rounds of training, pruning and rewinding (Frankle & Carbin 2019).

Round 0 is the dense network. Round r prunes the smallest of what round r-1 left, goes back to an early step of the
dense network, and trains that again. Everything here is pure or makes new states; the chain is :mod:`agent.lottery`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from diffusion_core.checkpoint import Checkpoint, CheckpointError
from diffusion_core.config import CoreConfig
from diffusion_core.model.cost import count_cost
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import build_network
from diffusion_core.randomness import Purpose, stream_seed
from diffusion_core.training.trainer import TrainState
from pruning.blocks import block_of
from pruning.config import PruneConfig
from pruning.masks.build import by_magnitude, layer_shares
from pruning.masks.mask import MASKS_PART, WeightMasks, empty_layers, hold_masks, sparsity
from pruning.masks.strategies import Masks, keep_highest, random_scores
from pruning.pruner import PruneReport, heard_knobs, keep_record


def remaining(round_number: int, per_round: float) -> float:
    """Share of the weights that is left after a round, ``(1 - per_round) ** round``, in (0, 1]."""
    return (1.0 - per_round) ** round_number


def most_rounds(weights: int, per_round: float) -> int:
    """The last round that leaves at least one of so many weights."""
    count = 0
    while weights - round((1.0 - remaining(count + 1, per_round)) * weights) >= 1:
        count += 1
    return count


def ticket(weights: Mapping[str, Tensor], masks: Masks, round_number: int, prune: PruneConfig) -> WeightMasks:
    """The mask of a round: the smallest of the trained weights go, down to :func:`remaining`, exact to one weight.

    Args:
        weights: the maskable weights at the end of the round before, as trained (not averaged).
        masks: the mask of the round before; None for the dense network.
        round_number: from 1.
        prune: share a round, ranking and profile.
    """
    # A profile by block, which depends on the number of resolutions, is not for lotteries.
    choose = by_magnitude(layer_shares(prune, levels=1))
    return choose(weights, masks, 1.0 - remaining(round_number, prune.per_round))


def trained_ticket(checkpoint: Checkpoint, round_number: int, prune: PruneConfig) -> WeightMasks:
    """The mask of a round, from the checkpoint in which the round before ended.

    Raises:
        CheckpointError: if its masks are not those of its network.
    """
    weights = maskable(checkpoint.network("model"))
    masks = None
    if MASKS_PART in checkpoint.parts:
        masks = {name: mask.bool() for name, mask in checkpoint.tensors(MASKS_PART).items()}
        if {name: mask.shape for name, mask in masks.items()} != {name: w.shape for name, w in weights.items()}:
            raise CheckpointError(f"{str(checkpoint.path)!r}: its masks are not those of its network")
    return ticket(weights, masks, round_number, prune)


def random_mask(masks: Mapping[str, Tensor], seed: int) -> WeightMasks:
    """A control: in each layer as many weights as the ticket's, at random positions."""
    chosen: WeightMasks = {}
    for name, score in random_scores(masks, seed).items():
        chosen |= keep_highest({name: score}, None, int(masks[name].sum()))
    return chosen


def rewound(early: Checkpoint, masks: WeightMasks, config: CoreConfig, device: torch.device) -> TrainState:
    """The dense network's training as it was at an early step, pruned.

    Weights and averages are those of that step times the mask; so are the optimizer's moments. Learning rate, order of
    the data and noise follow from the step, which is the checkpoint's.
    """
    state = TrainState.restore(early, config.train, config.ema, device)
    hold_masks(state, masks)
    return state


def reinitialised(masks: WeightMasks, num_classes: int, config: CoreConfig, device: torch.device) -> TrainState:
    """A control: the ticket's mask over weights drawn anew from the initial distribution, at step 0."""
    drawn = config.model_copy(update={"seed": stream_seed(config.seed, Purpose.REINIT)})
    state = TrainState.start(build_network(drawn, num_classes).to(device), config.train, config.ema)
    hold_masks(state, masks)
    return state


def record(state: TrainState, prune: PruneConfig, seed: int) -> None:
    """Write down in a state which ticket it is of, as pruners do; ``prune.rounds`` is the ticket's round."""
    masks = state.extra_parts[MASKS_PART]
    cost = count_cost(state.network)
    # Weights that start at zero are not pruned: the mask is counted, not the zeros.
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    report = PruneReport(
        method=prune.method,
        step=state.step,
        knobs=heard_knobs(prune),
        seed=seed,
        sparsity=sparsity(masks),
        before=replace(cost, nonzero_params=cost.params),
        after=replace(cost, nonzero_params=cost.params - pruned),
        details={"empty_layers": empty_layers(masks)},
    )
    keep_record(state, report)


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """Jaccard index of two tickets by block, and of all their weights (``all``), in [0, 1].

    The weights that both keep, as a share of those that at least one keeps; 1 where neither keeps any.

    Raises:
        ValueError: if they are not of the same network.
    """
    if {name: mask.shape for name, mask in first.items()} != {name: mask.shape for name, mask in second.items()}:
        raise ValueError("the tickets are not of the same network: names or shapes of their masks differ")
    return _jaccard(
        {name: (int((mask & second[name]).sum()), *_sizes(mask, second[name])) for name, mask in first.items()}
    )


def chance_overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """What :func:`overlap` is expected to be of independent masks with as many weights in each layer."""
    sizes = {name: _sizes(mask, second[name]) for name, mask in first.items()}
    return _jaccard({name: (one * two / first[name].numel(), one, two) for name, (one, two) in sizes.items()})


def _sizes(first: Tensor, second: Tensor) -> tuple[int, int]:
    return int(first.sum()), int(second.sum())


def _jaccard(layers: Mapping[str, tuple[float, int, int]]) -> dict[str, float]:
    """From what two masks share of each layer, and what each keeps of it."""
    both: defaultdict[str, float] = defaultdict(float)
    either: defaultdict[str, float] = defaultdict(float)
    for name, (shared, one, two) in layers.items():
        for key in ("all", block_of(name)):
            both[key] += shared
            either[key] += one + two - shared
    return {key: both[key] / either[key] if either[key] else 1.0 for key in both}
