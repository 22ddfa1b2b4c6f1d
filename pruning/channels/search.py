"""Find how many channels of each group to keep so that a network reaches a cost, and which channels these are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from diffusion_core.config import ConfigError
from diffusion_core.model.structure import Structure, sizes
from diffusion_core.model.unet import UNet
from diffusion_core.terminal.progress import Shown
from pruning.blocks import shared_blocks
from pruning.channels.groups import ChannelGroup, Kept, size_key
from pruning.channels.levels import DIFFUSERS, LevelWidths, shape_alike
from pruning.config import PruneConfig

Counts = dict[str, int]
"""Maps names of groups to numbers of channels to keep."""

TOLERANCE = 0.02
"""Relative error of the cost at which the search stops. Until then, it tries finer widths. A target that the narrowest
widths exceed by more is out of reach."""
STEPS = 24
"""Number of bisections if the cost can be counted; enough to distinguish any two widths."""
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def layer_sizes(network: UNet) -> Structure:
    """Return the sizes of every layer that has any."""
    return {name: now for name, module in network.named_modules() if (now := sizes(module))}


def shrunk_sizes(
    layers: Structure, groups: list[ChannelGroup], counts: Mapping[str, int], widths: str = "free"
) -> Structure:
    """Return the sizes of every layer after each group has kept the given number of channels.

    A group norm gets the greatest common divisor of its old number of groups and its new width; with ``prune.widths``
    of ``diffusers``, all norms get that of all of them.
    """
    shrunk = {name: dict(size) for name, size in layers.items()}
    for group in groups:
        for member in group.members:
            size = shrunk[member.layer]
            size[size_key(size, member.side)] -= group.width - counts[group.name]
    for size in shrunk.values():
        if "num_groups" in size:
            size["num_groups"] = math.gcd(size["num_channels"], size["num_groups"])
    if widths == DIFFUSERS:
        shape_alike(shrunk)
    return shrunk


def find_counts(
    network: UNet,
    groups: list[ChannelGroup],
    scores: Mapping[str, Tensor],
    prune: PruneConfig,
    cost: Callable[[Counts], float],
    target: float,
    steps: int = STEPS,
    progress: bool = False,
) -> Counts:
    """Bisect the amount of removal until the network reaches the target cost.

    Widths are multiples of ``prune.round_to``. If it is not set, they are multiples of the number of groups of the
    group norms, so that all norms keep their groups. If these miss the target, they are multiples of its next smaller
    divisor, and so on. A multiple of a divisor leaves a norm at least that many groups.

    Args:
        network: the network to shrink.
        groups: its groups of channels.
        scores: a score for every channel; minus infinity for channels that are removed already.
        prune: scope, rounding, widths, shares by block.
        cost: returns the cost of a network with given numbers of channels, in the target's unit.
        target: the cost to reach.
        steps: number of bisections.
        progress: show a progress bar.

    Raises:
        ConfigError: if even the narrowest network costs more, or ``prune.widths`` cannot be had.
    """
    units = [prune.round_to] if prune.round_to else _divisors(norm_groups(network))
    limits = {name: int(score.isfinite().sum()) for name, score in scores.items()}
    wanted = wanted_counts(network, groups, scores, prune)
    levels = LevelWidths(network, groups) if prune.widths == DIFFUSERS else None
    best: Counts = {}
    error = math.inf
    for unit in units:

        def counts_at(amount: float, unit: int = unit) -> Counts:
            return rounded(groups, wanted(amount), unit, limits, levels)

        least = cost(counts_at(1.0))
        if least > target * (1.0 + TOLERANCE):
            if unit == units[-1] and not best:
                raise out_of_reach(prune, prune.keep * least / target)
            continue
        low, high = 0.0, 1.0
        for _ in Shown(range(steps), f"widths in steps of {unit}", steps, "step", shown=progress, leave=False):
            middle = (low + high) / 2.0
            low, high = (middle, high) if cost(counts_at(middle)) > target else (low, middle)
        choices = [counts_at(low), counts_at(high)]
        if levels is not None and prune.target != "latency":  # So few widths change the cost in large steps.
            choices += levels.choices(wanted(low), unit, limits)
        for counts in choices:
            off = abs(cost(counts) / target - 1.0)
            if off < error:
                best, error = counts, off
        if error <= TOLERANCE or prune.target == "latency":  # Measured times are not that precise.
            break
    return best


def out_of_reach(prune: PruneConfig, share: float) -> ConfigError:
    """Return the error that at least this share of the target is left."""
    kind = " with prune.widths=diffusers" if prune.widths == DIFFUSERS else ""
    where: dict[float | str, str] = {0.0: "at the narrowest widths", 1.0: "without all blocks that can be removed"}
    deeper = "; prune.depth=auto removes blocks as well" if prune.depth == 0.0 else ""
    return ConfigError(
        f"prune.keep = {prune.keep:g}: out of reach; at least {math.ceil(share * 1000) / 1000:g} of the "
        f"{prune.target} stays {where.get(prune.depth, 'in the smallest network')}{kind or deeper}"
    )


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number, largest first."""
    return [unit for unit in range(number, 0, -1) if number % unit == 0]


def norm_groups(network: UNet) -> int:
    """Return the largest number of groups among the group norms of a network."""
    return max(module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm))


def wanted_counts(
    network: UNet, groups: list[ChannelGroup], scores: Mapping[str, Tensor], prune: PruneConfig
) -> Callable[[float], dict[str, float]]:
    """Return a function that maps the removed amount, 0 to 1 (all), to channels of each group to keep, not rounded."""
    if prune.scope == "global":
        relative = torch.cat(
            [score / score[score.isfinite()].mean().clamp(min=1e-30) for score in (scores[g.name] for g in groups)]
        )
        owner = torch.cat([torch.full((g.width,), i) for i, g in enumerate(groups)])
        weakest_first = owner[relative.argsort(stable=True)]

        def ranked(amount: float) -> dict[str, float]:
            stays = weakest_first[round(amount * len(weakest_first)) :]
            left = torch.bincount(stays, minlength=len(groups))
            return {group.name: float(left[i]) for i, group in enumerate(groups)}

        return ranked
    shares = {group.name: 1.0 - block_share(network, group, prune.block_keep) for group in groups}
    largest = max(shares.values())
    least = min((share for share in shares.values() if share), default=1.0)

    def alike(amount: float) -> dict[str, float]:
        # Blocks with the largest shares may reach their minimum before the others.
        scale = amount / least if largest else 0.0
        return {group.name: group.width * (1.0 - min(1.0, scale * shares[group.name])) for group in groups}

    return alike


def block_share(network: UNet, group: ChannelGroup, block_keep: list[float]) -> float:
    """Return the share of a group in ``prune.block_keep``; 0 without shares.

    The input layer belongs to the first block, and the embedding of time and label to the middle.
    """
    if not block_keep:
        return 0.0
    names = shared_blocks(len(network.down))
    if group.name == "conv_in":
        return block_keep[0]
    return next(
        (share for name, share in zip(names, block_keep, strict=True) if group.name.startswith(f"{name}.")),
        block_keep[names.index("middle")],
    )


def rounded(
    groups: list[ChannelGroup],
    wanted: Mapping[str, float],
    unit: int,
    limits: Mapping[str, int],
    levels: LevelWidths | None,
) -> Counts:
    """Round numbers of channels, each by itself or, with ``levels``, to widths that a UNet2DModel can have."""
    if levels is not None:
        return levels.counts(wanted, unit, limits, GOLDEN)
    return round_counts(groups, wanted, unit, limits)


def round_counts(
    groups: list[ChannelGroup], wanted: Mapping[str, float], unit: int, limits: Mapping[str, int]
) -> Counts:
    """Round numbers of channels to multiples of ``unit`` and of the number of heads, from one multiple to the limit.

    Groups round up at different fractions, spread evenly by the golden ratio, so that the cost changes in small steps
    although many groups have the same width.
    """
    counts = {}
    for index, group in enumerate(groups):
        step = min(math.lcm(unit, group.heads), limits[group.name])
        phase = (index * GOLDEN) % 1.0
        whole = step * math.floor(wanted[group.name] / step + phase)
        counts[group.name] = min(max(whole, step), limits[group.name])
    return counts


def choose(network: UNet, group: ChannelGroup, scores: Tensor, count: int) -> Tensor:
    """Return which channels of a group to keep, ``(width,)`` bool: the highest scores, ties broken by position.

    Attention heads keep equally many channels, and so do groups of a norm, so that each group keeps its own channels.
    Where channels that are removed already (score minus infinity) leave a group too few, fewer and larger groups do.
    """
    parts = group.heads
    for member in group.members:
        module = network.get_submodule(member.layer)
        if isinstance(module, nn.GroupNorm) and member.places == tuple(range(module.num_channels)):
            parts = math.lcm(parts, math.gcd(count, module.num_groups))
    enough = (n for n in _divisors(parts) if scores.view(n, -1).isfinite().sum(dim=1).min() >= count // n)
    parts = next((n for n in enough if n % group.heads == 0), group.heads)
    order = scores.view(parts, -1).argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros(parts, group.width // parts, dtype=torch.bool)
    keep.scatter_(1, order[:, : count // parts], True)
    return keep.flatten()


def choose_all(network: UNet, groups: list[ChannelGroup], scores: Mapping[str, Tensor], counts: Counts) -> Kept:
    """Return which channels of every group to keep."""
    return {group.name: choose(network, group, scores[group.name], counts[group.name]) for group in groups}
