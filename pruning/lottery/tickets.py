"""Lottery tickets: subnetworks found by rounds of training, pruning and rewinding (Frankle & Carbin 2019).

Round 0 trains the dense network. Round r prunes the smallest weights that round r-1 left, rewinds to an early step of
the dense network, and trains again. Functions here are pure or create new states. :mod:`agent.lottery` runs the rounds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

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
    """Return the share of the weights that is left after a round, ``(1 - per_round) ** round``, in (0, 1]."""
    return (1.0 - per_round) ** round_number


def most_rounds(weights: int, per_round: float) -> int:
    """Return the number of the last round that leaves at least one of the weights."""
    count = 0
    while weights - round((1.0 - remaining(count + 1, per_round)) * weights) >= 1:
        count += 1
    return count


def ticket(weights: Mapping[str, Tensor], masks: Masks, round_number: int, prune: PruneConfig) -> WeightMasks:
    """Return the masks of a round: prune the smallest weights until :func:`remaining` is left, exact to one weight.

    Args:
        weights: the maskable weights at the end of the previous round, as trained (not averaged).
        masks: the masks of the previous round; None for the dense network.
        round_number: number of the round, from 1.
        prune: share per round, ranking and profile.
    """
    # Lotteries do not support the profile ``blocks``, which needs the number of resolutions.
    choose = by_magnitude(layer_shares(prune, levels=1))
    return choose(weights, masks, 1.0 - remaining(round_number, prune.per_round))


def trained_ticket(checkpoint: Checkpoint, round_number: int, prune: PruneConfig) -> WeightMasks:
    """Return the masks of a round, from the final checkpoint of the previous round.

    Raises:
        CheckpointError: if the checkpoint's masks are not those of its network.
    """
    weights = maskable(checkpoint.network("model"))
    masks = None
    if MASKS_PART in checkpoint.parts:
        masks = {name: mask.bool() for name, mask in checkpoint.tensors(MASKS_PART).items()}
        if {name: mask.shape for name, mask in masks.items()} != {name: w.shape for name, w in weights.items()}:
            raise CheckpointError(f"{str(checkpoint.path)!r}: its masks are not those of its network")
    return ticket(weights, masks, round_number, prune)


def random_mask(masks: Mapping[str, Tensor], seed: int) -> WeightMasks:
    """Return a control: random masks that keep as many weights in each layer as the ticket."""
    chosen: WeightMasks = {}
    for name, score in random_scores(masks, seed).items():
        chosen |= keep_highest({name: score}, None, int(masks[name].sum()))
    return chosen


def rewound(early: Checkpoint, masks: WeightMasks, config: CoreConfig, device: torch.device) -> TrainState:
    """Return the dense network's training state at an early step, pruned.

    Weights, averages and the optimizer's moments are those of that step, times the masks. Learning rate, order of the
    data and noise depend only on the step, which is that of the checkpoint.
    """
    state = TrainState.restore(early, config.train, config.ema, device)
    state.since_row.reset()  # Those steps were the dense network's.
    hold_masks(state, masks)
    return state


def reinitialised(masks: WeightMasks, num_classes: int, config: CoreConfig, device: torch.device) -> TrainState:
    """Return a control at step 0: the ticket's masks over weights drawn anew from the initial distribution."""
    drawn = config.model_copy(update={"seed": stream_seed(config.seed, Purpose.REINIT)})
    state = TrainState.start(build_network(drawn, num_classes).to(device), config.train, config.ema)
    hold_masks(state, masks)
    return state


def record(state: TrainState, prune: PruneConfig, seed: int) -> None:
    """Add a record of its ticket to a state, as pruners do. ``prune.rounds`` is the ticket's round."""
    masks = state.extra_parts[MASKS_PART]
    report = PruneReport(
        method=prune.method,
        step=state.step,
        knobs=heard_knobs(prune),
        seed=seed,
        sparsity=sparsity(masks),
        before=count_cost(state.network),
        after=count_cost(state.network, masks),
        details={"empty_layers": empty_layers(masks)},
    )
    keep_record(state, report)


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the Jaccard index of two tickets by block, and for all weights (``all``), in [0, 1].

    It is the number of weights that both keep, divided by the number that at least one keeps; 1 if neither keeps any.

    Raises:
        ValueError: if the tickets are not of the same network.
    """
    if {name: mask.shape for name, mask in first.items()} != {name: mask.shape for name, mask in second.items()}:
        raise ValueError("the tickets are not of the same network: names or shapes of their masks differ")
    return _jaccard(
        {name: (int((mask & second[name]).sum()), *_sizes(mask, second[name])) for name, mask in first.items()}
    )


def chance_overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the :func:`overlap` to expect of independent masks that keep as many weights in each layer."""
    sizes = {name: _sizes(mask, second[name]) for name, mask in first.items()}
    return _jaccard({name: (one * two / first[name].numel(), one, two) for name, (one, two) in sizes.items()})


def _sizes(first: Tensor, second: Tensor) -> tuple[int, int]:
    return int(first.sum()), int(second.sum())


def _jaccard(layers: Mapping[str, tuple[float, int, int]]) -> dict[str, float]:
    """Compute the index from the numbers of weights of each layer that both masks keep, and that each keeps."""
    both: defaultdict[str, float] = defaultdict(float)
    either: defaultdict[str, float] = defaultdict(float)
    for name, (shared, one, two) in layers.items():
        for key in ("all", block_of(name)):
            both[key] += shared
            either[key] += one + two - shared
    return {key: both[key] / either[key] if either[key] else 1.0 for key in both}
