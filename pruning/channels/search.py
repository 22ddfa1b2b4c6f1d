"""How many channels of each group stay, so that a network costs what it should; and which of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_core.config import ConfigError
from diffusion_core.model.structure import Structure, sizes
from diffusion_core.model.unet import UNet
from pruning.channels.groups import ChannelGroup, Kept, size_key
from pruning.config import PruneConfig

Counts = dict[str, int]
"""Name of a group to the number of its channels that stay."""

TOLERANCE = 0.02
"""A target that cannot be approached this closely from above is out of reach."""
CLOSE_ENOUGH = 0.01
"""Widths are made finer until the cost is that close to the target."""
STEPS = 24
"""Bisections where the cost can be counted; enough to tell any two widths apart."""
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def layer_sizes(network: UNet) -> Structure:
    """The sizes of every layer that has any."""
    return {name: now for name, module in network.named_modules() if (now := sizes(module))}


def shrunk_sizes(layers: Structure, groups: list[ChannelGroup], counts: Mapping[str, int]) -> Structure:
    """The sizes of every layer once each group has kept so many channels.

    A group norm gets the most groups that divide both its old number of groups and its new width.
    """
    shrunk = {name: dict(size) for name, size in layers.items()}
    for group in groups:
        for member in group.members:
            size = shrunk[member.layer]
            size[size_key(size, member.side)] -= group.width - counts[group.name]
    for size in shrunk.values():
        if "num_groups" in size:
            size["num_groups"] = math.gcd(size["num_channels"], size["num_groups"])
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
    """Bisect on how much is removed until the network costs what it should.

    Args:
        network: the network that is to shrink.
        groups: its groups of channels.
        scores: a score for every channel; minus infinity for one that is gone already.
        prune: scope, rounding, shares by block.
        cost: of a network that keeps so many channels, in the target's unit; falls with them.
        target: the cost that is wanted.
        steps: bisections.
        progress: show a bar.

    Raises:
        ConfigError: if even the narrowest network costs more.
    """
    depth = range(int(math.log2(max(1, _norm_groups(network) // 4))) + 1)
    units = [prune.round_to] if prune.round_to else [2**i for i in reversed(depth)]
    limits = {name: int(score.isfinite().sum()) for name, score in scores.items()}
    wanted = _removal(network, groups, scores, prune)
    best: Counts = {}
    error = math.inf
    for unit in units:

        def counts_at(amount: float, unit: int = unit) -> Counts:
            return round_counts(groups, wanted(amount), unit, limits)

        least = cost(counts_at(1.0))
        if least > target * (1.0 + TOLERANCE):
            if unit == units[-1] and not best:
                share = prune.keep * least / target
                raise ConfigError(
                    f"prune.keep = {prune.keep:g}: out of reach; at least {math.ceil(share * 1000) / 1000:g} of the "
                    f"{prune.target} stays at the narrowest widths"
                )
            continue
        low, high = 0.0, 1.0
        for _ in tqdm(range(steps), desc=f"widths in steps of {unit}", leave=False, disable=not progress):
            middle = (low + high) / 2.0
            low, high = (middle, high) if cost(counts_at(middle)) > target else (low, middle)
        for amount in (low, high):
            off = abs(cost(counts_at(amount)) / target - 1.0)
            if off < error:
                best, error = counts_at(amount), off
        if error <= CLOSE_ENOUGH or prune.target == "latency":  # A clock is not that exact.
            break
    return best


def _norm_groups(network: UNet) -> int:
    return max(module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm))


def _removal(
    network: UNet, groups: list[ChannelGroup], scores: Mapping[str, Tensor], prune: PruneConfig
) -> Callable[[float], dict[str, float]]:
    """How many channels of each group should stay, not rounded, when 0 (nothing) to 1 (all) is removed."""
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
        # Blocks that lose most may be at their least before the others are.
        scale = amount / least if largest else 0.0
        return {group.name: group.width * (1.0 - min(1.0, scale * shares[group.name])) for group in groups}

    return alike


def block_names(network: UNet) -> list[str]:
    """The blocks that ``prune.block_keep`` speaks of: resolutions on the way down, the middle, those on the way up."""
    return [*(f"down.{i}" for i in range(len(network.down))), "middle", *(f"up.{i}" for i in range(len(network.up)))]


def block_share(network: UNet, group: ChannelGroup, block_keep: list[float]) -> float:
    """The share of a group in ``prune.block_keep``; 0 if it has none. The input belongs to the first block, the
    embedding of time and label to the middle one.
    """
    if not block_keep:
        return 0.0
    names = block_names(network)
    if group.name == "conv_in":
        return block_keep[0]
    return next(
        (share for name, share in zip(names, block_keep, strict=True) if group.name.startswith(f"{name}.")),
        block_keep[names.index("middle")],
    )


def round_counts(
    groups: list[ChannelGroup], wanted: Mapping[str, float], unit: int, limits: Mapping[str, int]
) -> Counts:
    """Whole numbers of channels: multiples of ``unit`` and of the number of heads, at least one and at most the limit.

    Groups are rounded at different points (spread evenly by the golden ratio), so that the cost moves in small steps
    although many groups are equally wide.
    """
    counts = {}
    for index, group in enumerate(groups):
        step = min(math.lcm(unit, group.heads), limits[group.name])
        phase = (index * GOLDEN) % 1.0
        whole = step * math.floor(wanted[group.name] / step + phase)
        counts[group.name] = min(max(whole, step), limits[group.name])
    return counts


def choose(network: UNet, group: ChannelGroup, scores: Tensor, count: int) -> Tensor:
    """Which channels of a group stay, ``(width,)`` bool: the best ones, ties broken by position.

    As many of each attention head, and of each group of a norm, so that what a norm averages over stays together.
    """
    parts = group.heads
    for member in group.members:
        module = network.get_submodule(member.layer)
        if isinstance(module, nn.GroupNorm) and member.places == tuple(range(module.num_channels)):
            parts = math.lcm(parts, math.gcd(count, module.num_groups))
    order = scores.view(parts, -1).argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros(parts, group.width // parts, dtype=torch.bool)
    keep.scatter_(1, order[:, : count // parts], True)
    return keep.flatten()


def choose_all(network: UNet, groups: list[ChannelGroup], scores: Mapping[str, Tensor], counts: Counts) -> Kept:
    """Which channels of every group stay."""
    return {group.name: choose(network, group, scores[group.name], counts[group.name]) for group in groups}
