"""Which blocks to remove so that enough is saved and the output moves least."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence


def cheapest(losses: Mapping[str, float], saved: Mapping[str, int], least: float, never: Sequence[str]) -> list[str]:
    """Return the set of blocks with the smallest sum of losses among those that save enough.

    LAPTOP-Diff (Zhang et al. 2024) states this as a knapsack problem, with output losses that add up approximately.
    It is solved exactly: block by block, all sets stay that no other one beats in both loss and saving (Nemhauser &
    Ullmann 1969). Of equal losses, the set that saves more is taken, then the one of earlier blocks.

    Args:
        losses: loss without each block, >= 0.
        saved: what the removal of each block saves, >= 0.
        least: what the set must save, at most the sum of all.
        never: blocks that must not be removed all together; empty: any may be.

    Returns:
        Names of the blocks, in the order of ``losses``. If only sets with all of ``never`` save enough, all blocks but
        the one of ``never`` with the largest loss, which save less.
    """
    names = list(losses)
    best = _cheapest(names, losses, saved, least)
    if never and set(never) <= set(best):
        # Removing all of them is excluded by keeping each of them in turn.
        kept = [[name for name in names if name != spared] for spared in never]
        enough = [some for some in kept if sum(saved[name] for name in some) >= least]
        if not enough:
            spared = max(never, key=lambda name: losses[name])
            return [name for name in names if name != spared]
        found = [_cheapest(some, losses, saved, least) for some in enough]
        best = min(found, key=lambda some: sum(losses[name] for name in some))
    return best


def _cheapest(names: Sequence[str], losses: Mapping[str, float], saved: Mapping[str, int], least: float) -> list[str]:
    """Solve the problem without exceptions."""
    front: list[tuple[float, float, int]] = [(0.0, 0.0, 0)]  # Loss, minus what is saved, chosen blocks as bits.
    for index, name in enumerate(names):
        more = [(loss + losses[name], save - saved[name], bits | 1 << index) for loss, save, bits in front]
        # Sorted by loss, a set stays if it saves more than all before it. What exceeds the need counts no more.
        front = _undominated(sorted(itertools.chain(front, more)), -least)
    chosen = front[-1][2]
    return [name for index, name in enumerate(names) if chosen >> index & 1]


def _undominated(sets: Sequence[tuple[float, float, int]], enough: float) -> list[tuple[float, float, int]]:
    kept: list[tuple[float, float, int]] = []
    for loss, save, bits in sets:
        if not kept or save < kept[-1][1]:
            kept.append((loss, save, bits))
            if save <= enough:
                break
    return kept
