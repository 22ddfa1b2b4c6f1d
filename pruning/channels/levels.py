"""Widths that a `UNet2DModel` of Diffusers can have: one for each resolution, one for the embedding of time and label.

Groups of channels that must be equally wide are one class. Neighbouring resolutions between which residual blocks have
no convolution in their skip are one class too. Attention heads have one width in the whole network, so classes with
several heads form a family, whose widths are multiples of one width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from diffusion_core.config import ConfigError
from diffusion_core.model.structure import Structure
from diffusion_core.model.timesteps import kept_frequencies
from diffusion_core.model.unet import UNet
from pruning.channels.groups import ChannelGroup

DIFFUSERS = "diffusers"
"""Value of ``prune.widths`` that asks for such widths."""

EMBEDDING = -1
"""Stands for the embedding among the indices of resolutions."""


@dataclass(frozen=True)
class WidthClass:
    """Groups of channels that keep equally many.

    Attributes:
        groups: their names.
        levels: the resolutions that have this width, 0 being the highest, or ``EMBEDDING``.
        width: the most channels that each can keep.
        heads: number of attention heads, which keep equally many channels; 1 without.
        even: whether the width is even, as that of the timestep's features.
    """

    groups: tuple[str, ...]
    levels: tuple[int, ...]
    width: int
    heads: int
    even: bool


Family = tuple[WidthClass, ...]
"""Classes whose widths are multiples, by their heads, of one width."""


def families(network: UNet, groups: list[ChannelGroup]) -> list[Family]:
    """Return the groups of channels of a network in families, in the order of the network."""
    joined: dict[int, int] = {level: level for level in (*range(len(network.down)), EMBEDDING)}
    for group in groups:
        first, *others = sorted({joined[level] for level in _levels(network, group)})
        joined = {level: first if root in others else root for level, root in joined.items()}
    roots = list(dict.fromkeys(joined.values()))
    classes = []
    for root in roots:
        members = [group for group in groups if joined[_levels(network, group)[0]] == root]
        classes.append(
            WidthClass(
                tuple(group.name for group in members),
                tuple(level for level, of in joined.items() if of == root),
                min(group.width for group in members),
                math.lcm(*(group.heads for group in members)),
                root == 0,
            )
        )
    several = any(one.heads > 1 for one in classes)
    attending = {level for level, down in enumerate(network.down) if len(down.attentions)}  # type: ignore[arg-type]
    attending.add(len(network.down) - 1)
    together = [one for one in classes if several and attending.intersection(one.levels)]
    alone = [(one,) for one in classes if one not in together]
    return [*alone, *([tuple(together)] if together else [])]


def _levels(network: UNet, group: ChannelGroup) -> list[int]:
    """Return the resolutions of the layers that output the channels of a group."""
    giving = {
        member.layer
        for member in group.members
        if member.side == "out" and not isinstance(network.get_submodule(member.layer), nn.GroupNorm)
    }
    return sorted({_level(network, layer) for layer in giving})


def _level(network: UNet, layer: str) -> int:
    lowest = len(network.down) - 1
    match layer.split("."):
        case ["time_mlp" | "label_embedding", *_]:
            return EMBEDDING
        case ["down", index, *_]:
            return int(index)
        case ["up", index, *_]:
            return lowest - int(index)
        case ["middle", *_]:
            return lowest
    return 0  # conv_in


class LevelWidths:
    """Rounds numbers of channels to widths that a `UNet2DModel` can have."""

    def __init__(self, network: UNet, groups: list[ChannelGroup]) -> None:
        self.families = families(network, groups)
        self._full = {group.name: group.width for group in groups}

    def counts(
        self, wanted: Mapping[str, float], unit: int, limits: Mapping[str, int], phases: float
    ) -> dict[str, int]:
        """Return how many channels each group keeps, multiples of ``unit`` where heads allow it.

        A family keeps the mean share of its groups. Families round up at different fractions, as
        :func:`pruning.channels.search.round_counts` explains.

        Args:
            wanted: channels of each group to keep, not rounded.
            unit: what widths are multiples of.
            limits: the most channels that each group can keep.
            phases: the fraction by which the rounding of one family differs from that of the next.

        Raises:
            ConfigError: if two resolutions cannot have different widths although the layer between them needs that.
        """
        least, most = self._bounds(unit, limits)
        steps = enumerate(self._steps(wanted, least, most))
        return self._widened([math.floor(step + (index * phases) % 1.0) for index, step in steps], least, most)

    def choices(self, wanted: Mapping[str, float], unit: int, limits: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """Yield what :meth:`counts` could return: every family rounded down or up. The arguments are the same."""
        least, most = self._bounds(unit, limits)
        steps = self._steps(wanted, least, most)
        for multiples in itertools.product(*((math.floor(step), math.floor(step) + 1) for step in steps)):
            yield self._widened(list(multiples), least, most)

    def _bounds(self, unit: int, limits: Mapping[str, int]) -> tuple[list[int], list[int]]:
        """Return the smallest and the largest width of a head of each family; all are multiples of the smallest."""
        most = [
            min(min(one.width, *(limits[name] for name in one.groups)) // one.heads for one in family)
            for family in self.families
        ]
        steps = [math.lcm(*(_step(one, unit) for one in family)) for family in self.families]
        return [min(pair) for pair in zip(steps, most, strict=True)], most

    def _steps(self, wanted: Mapping[str, float], least: list[int], most: list[int]) -> list[float]:
        """Return the wanted width of a head of each family, in multiples of the smallest one."""
        shares = []
        for family in self.families:
            names = [name for one in family for name in one.groups]
            shares.append(sum(wanted[name] for name in names) / sum(self._full[name] for name in names))
        return [share * top / step for share, step, top in zip(shares, least, most, strict=True)]

    def _widened(self, multiples: list[int], least: list[int], most: list[int]) -> dict[str, int]:
        base = [min(max(count, 1) * step, top) for count, step, top in zip(multiples, least, most, strict=True)]
        _keep_apart(self.families, base, least, most)
        return {
            name: one.heads * width
            for family, width in zip(self.families, base, strict=True)
            for one in family
            for name in one.groups
        }


def _step(one: WidthClass, unit: int) -> int:
    """Return the smallest width of a head with which the width of a class is a multiple of ``unit``."""
    unit = math.lcm(unit, 2) if one.even else unit
    return unit // math.gcd(unit, one.heads)


def _keep_apart(known: list[Family], base: list[int], least: list[int], most: list[int]) -> None:
    """Widen resolutions, in place, that would become as narrow as their neighbour.

    A `UNet2DModel` has a convolution in the skip of a block if and only if its widths differ.
    """
    place = {level: (index, one) for index, family in enumerate(known) for one in family for level in one.levels}
    pairs = [sorted((place[level], place[level + 1]), key=lambda entry: entry[1].width)
             for level in range(max(place)) if place[level][1] is not place[level + 1][1]]  # fmt: skip
    pairs.sort(key=lambda pair: pair[1][1].width)
    for _ in pairs:  # Widening one may reach the next.
        for (narrow, one), (wide, other) in pairs:
            taken = one.heads * base[narrow]
            if taken >= other.heads * base[wide]:
                base[wide] = min(least[wide] * (taken // (other.heads * least[wide]) + 1), most[wide])
    for (narrow, one), (wide, other) in pairs:
        if one.heads * base[narrow] == other.heads * base[wide]:
            raise ConfigError(
                f"prune.widths = '{DIFFUSERS}': resolutions {one.levels[0]} and {other.levels[0]}, which were pruned "
                f"before, cannot have different widths; start from a dense network"
            )


def shape_alike(shrunk: Structure) -> None:
    """Give all norms of a network equally many groups, and the timestep as many features as `UNet2DModel` does."""
    norms = [size for size in shrunk.values() if "num_groups" in size]
    groups = math.gcd(*(math.gcd(size["num_groups"], size["num_channels"]) for size in norms))
    for size in norms:
        size["num_groups"] = groups
    shrunk["time_mlp.0"]["in_features"] = shrunk["conv_in"]["out_channels"]


def kept_time_features(network: UNet, kept: int) -> list[int]:
    """Return which inputs of ``time_mlp.0`` have the frequencies that remain with ``kept`` features.

    A frequency that the network has not, because it was pruned before, is given as its number of inputs.
    """
    lost = network.time_features
    now = list(kept_frequencies(network.width, lost))
    known = {frequency: place for place, frequency in enumerate(now)}
    places = [known.get(frequency, lost) for frequency in kept_frequencies(network.width, kept)]
    return [*places, *(place if place == lost else place + len(now) for place in places), *[lost] * (kept % 2)]
