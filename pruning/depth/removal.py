"""Remove blocks, alone or before channels, until ``prune.keep`` of ``prune.target`` is left.

What each block contributes is measured once (:mod:`pruning.depth.effect`). For every cost to reach, the blocks whose
losses add up to least are removed (:mod:`pruning.depth.choice`). Counted costs of blocks add up. The time of a network
does not, so its multiply-accumulates are bisected until the time is met.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from diffusion_core.model.cost import LATENCY_BATCH, latencies
from diffusion_core.model.depth import residual_blocks
from diffusion_core.model.unet import UNet
from pruning.calibration import Calibration
from pruning.channels.reach import narrowest
from pruning.channels.removal import LATENCY_STEPS, Removal, prune_channels
from pruning.channels.search import TOLERANCE, out_of_reach
from pruning.config import PruneConfig
from pruning.depth.choice import cheapest
from pruning.depth.effect import output_losses
from pruning.shallow import candidates, check_blocks, counted, savings, shallower

DEPTHS = 10
"""Number of steps from ``prune.depth`` to 1 that are tried if channels cannot reach the target after fewer blocks."""
AUTO_FLOOR = 0.5
"""Share of each width with which channels have to reach the target, or ``prune.depth=auto`` removes more blocks. Layers
of narrower networks take nearly as long. Down to a quarter, digits with blocks removed were drawn better by far."""
TIMED_S = 1.0
"""Seconds that the time of a network is measured for."""
TIMED_TIMES = 10
"""Smallest number of passes that are timed. The fastest counts, as others may be slowed by other work."""


def prune_network(
    network: UNet,
    prune: PruneConfig,
    seed: int = 0,
    calibration: Calibration | None = None,
    progress: bool = False,
) -> tuple[UNet, Removal]:
    """Remove blocks and channels until ``prune.keep`` of ``prune.target`` is left.

    First the blocks of ``prune.blocks``. Then blocks until ``prune.keep ** prune.depth`` is left, none with 0. Then
    channels, none with 1. If the narrowest widths still miss the target, more blocks go. ``auto`` starts with no
    blocks, and removes some if channels miss the target even with :data:`AUTO_FLOOR` of their width.

    Args:
        network: the network; it does not change.
        prune: the knobs of pruning.
        seed: seed of importances that draw.
        calibration: training images, for importances with gradients and for ``prune.depth``.
        progress: show a progress bar.

    Returns:
        The smaller network, and what was removed.

    Raises:
        ConfigError: if the target is out of reach, or a block of ``prune.blocks`` cannot be removed.
    """
    check_blocks(network, prune)
    if prune.depth == 0.0:
        shallow = shallower(network, prune.blocks)
        if prune.blocks and _share(shallow, network, prune) <= prune.keep:
            return shallow, Removal({}, blocks=prune.blocks)
        smaller, removal = prune_channels(shallow, prune, seed, calibration, progress, reference=network)
        return smaller, replace(removal, blocks=prune.blocks)
    assert calibration is not None  # It needs images.
    blocks = _blocks_in_steps(network, prune, calibration)
    shallow = shallower(network, blocks)
    if prune.depth == 1.0 or (blocks and _share(shallow, network, prune) <= prune.keep):
        return shallow, Removal({}, blocks=blocks)
    smaller, removal = prune_channels(shallow, prune, seed, calibration, progress, reference=network)
    return smaller, replace(removal, blocks=blocks)


def _share(smaller: UNet, network: UNet, prune: PruneConfig) -> float:
    """Return the cost of a smaller network relative to that of the network, in the unit of ``prune.target``."""
    if prune.target != "latency":
        return counted(smaller, prune) / counted(network, prune)
    ours, theirs = latencies([smaller, network], LATENCY_BATCH, TIMED_S, least=TIMED_TIMES)
    return ours / theirs


def _blocks_in_steps(network: UNet, prune: PruneConfig, calibration: Calibration) -> list[str]:
    """Return the blocks to remove: more in every step, until channels can do the rest."""
    pick = _picker(network, prune, calibration)
    if prune.depth == 1.0:
        blocks = _blocks_for(network, prune, pick, prune.keep)
        if (left := _share(shallower(network, blocks), network, prune)) > prune.keep * (1.0 + TOLERANCE):
            raise out_of_reach(prune, left)
        return blocks
    first, floors = (0.0, (AUTO_FLOOR, 0.0)) if prune.depth == "auto" else (prune.depth, (0.0,))
    blocks = []
    for floor, step in itertools.product(floors, range(DEPTHS + 1)):
        share = prune.keep ** (first + (1.0 - first) * step / DEPTHS)
        blocks = _blocks_for(network, prune, pick, share) if share < 1.0 else list(prune.blocks)
        if _share(narrowest(shallower(network, blocks), prune, floor), network, prune) <= prune.keep:
            return blocks
    return blocks  # The search for widths says how much stays.


def _picker(network: UNet, prune: PruneConfig, calibration: Calibration) -> Callable[[float], list[str]]:
    """Return the function that picks the blocks after whose removal a share of the counted cost is left."""
    start = shallower(network, prune.blocks)
    names = candidates(network, prune)
    losses = output_losses(start, calibration, prune.calibration_batches, names)
    saved = savings(start, names, prune)
    whole, now = counted(network, prune), counted(start, prune)
    never = [name for name in residual_blocks(start) if name in names]
    if len(never) < len(residual_blocks(start)):
        never = []  # Another residual block stays in any case.

    def pick(share: float) -> list[str]:
        least = min(now - share * whole, sum(saved.values()))
        return [*prune.blocks, *(cheapest(losses, saved, least, never) if least > 0 else [])]

    return pick


def _blocks_for(network: UNet, prune: PruneConfig, pick: Callable[[float], list[str]], share: float) -> list[str]:
    """Return the blocks to remove so that a share of ``prune.target`` is left."""
    if prune.target != "latency":
        return pick(share)
    low, high = 0.0, 1.0
    tried: dict[tuple[str, ...], float] = {}
    for _ in range(LATENCY_STEPS):
        middle = (low + high) / 2.0
        blocks = pick(middle)
        if tuple(blocks) not in tried:
            tried[tuple(blocks)] = _share(shallower(network, blocks), network, prune)
        low, high = (low, middle) if tried[tuple(blocks)] > share else (middle, high)
    return pick(low)
