"""Whether a target of structured pruning can be reached: the smallest network follows from shapes alone."""

from __future__ import annotations

from functools import lru_cache

import torch

from diffusion_core.config import CoreConfig, ModelConfig
from diffusion_core.model.cost import LATENCY_BATCH, count_sizes, latencies, network_layers
from diffusion_core.model.unet import UNet
from pruning.channels.groups import ChannelGroup, channel_groups
from pruning.channels.levels import DIFFUSERS, LevelWidths
from pruning.channels.removal import untrained
from pruning.channels.search import (
    TOLERANCE,
    Counts,
    layer_sizes,
    out_of_reach,
    rounded,
    shrunk_sizes,
    wanted_counts,
)
from pruning.config import COUNTED_TARGETS, PruneConfig
from pruning.estimate import USUAL_CLASSES
from pruning.shallow import check_blocks, counted, shallower, shallowest

LATENCY_MARGIN = 1.1
"""A measured time is taken for out of reach only if it is this much too long: it varies."""

MOST_NETWORKS = 24
"""Kinds of networks that are traced for one sweep; a large one takes two seconds."""


def least_share(network: UNet, prune: PruneConfig) -> float:
    """Return the share of ``prune.target`` that is left of the smallest network that the knobs allow, in (0, 1].

    Args:
        network: the network to prune; its weights do not matter.
        prune: target, rounding, widths and shares by block, depth. The target is not ``latency``, which is measured.
    """
    smallest = _without_blocks(network, prune)
    if prune.depth == 1.0:
        return counted(smallest, prune) / counted(network, prune)
    groups = channel_groups(smallest)
    widths = shrunk_sizes(layer_sizes(smallest), groups, narrowest_counts(smallest, groups, prune), prune.widths)
    least = count_sizes(network_layers(smallest), widths)[COUNTED_TARGETS.index(prune.target)]
    return least / counted(network, prune)


def _without_blocks(network: UNet, prune: PruneConfig) -> UNet:
    """Return a network without all blocks that may be removed."""
    return shallower(network, prune.blocks) if prune.depth == 0.0 else shallowest(network, prune)


def least_time(network: UNet, prune: PruneConfig) -> float:
    """Measure the time of the smallest network that the knobs allow, relative to that of ``network``, on its device."""
    smallest = _without_blocks(network, prune)
    if prune.depth != 1.0:
        smallest = narrowest(smallest, prune)
    ours, theirs = latencies([smallest, network], LATENCY_BATCH, least=3)
    return ours / theirs


def narrowest_counts(network: UNet, groups: list[ChannelGroup], prune: PruneConfig, floor: float = 0.0) -> Counts:
    """Return the numbers of channels of the narrowest network that the knobs allow, but ``floor`` of each width."""
    alike = {group.name: torch.ones(group.width, dtype=torch.float64) for group in groups}
    wanted = wanted_counts(network, groups, alike, prune)
    widths = {group.name: group.width for group in groups}
    least = {name: max(count, floor * widths[name]) for name, count in wanted(1.0).items()}
    levels = LevelWidths(network, groups) if prune.widths == DIFFUSERS else None
    return rounded(groups, least, prune.round_to or 1, widths, levels)


def narrowest(network: UNet, prune: PruneConfig, floor: float = 0.0) -> UNet:
    """Return the network of :func:`narrowest_counts`, with arbitrary weights."""
    groups = channel_groups(network)
    return untrained(network, groups, narrowest_counts(network, groups, prune, floor), prune.widths)


def check_reach(network: UNet, prune: PruneConfig, device: torch.device | None = None) -> None:
    """Check that structured pruning can reach its target with a network, and remove the blocks that it names.

    Args:
        network: the network before pruning.
        prune: the knobs.
        device: where ``prune.target=latency`` is measured; None: where the network is.

    Raises:
        ConfigError: if even the smallest network costs more, or a block cannot be removed.
    """
    if prune.method != "structured":
        return
    check_blocks(network, prune)
    timed = prune.target not in COUNTED_TARGETS
    share = (
        least_time(network if device is None else network.to(device), prune) / LATENCY_MARGIN
        if timed
        else least_share(network, prune)
    )
    refuse_out_of_reach(prune, share)


def refuse_out_of_reach(prune: PruneConfig, share: float) -> None:
    """Raise ConfigError if more than ``prune.keep`` is left at the narrowest widths."""
    if share > prune.keep * (1.0 + TOLERANCE):
        raise out_of_reach(prune, share)


class Reach:
    """Checks many configurations, such as the trials of a sweep. Networks of one kind are traced once."""

    def __init__(self) -> None:
        self._traced: set[tuple[str, ...]] = set()

    def check(self, config: CoreConfig, prune: PruneConfig) -> None:
        """Check a configuration that starts from new weights, as :func:`check_reach` does.

        After ``MOST_NETWORKS`` kinds of networks, further ones are not checked: their runs are, before the first step.

        Raises:
            ConfigError: if structured pruning cannot reach its target, or a block cannot be removed.
        """
        if prune.method != "structured" or (prune.target not in COUNTED_TARGETS and not prune.blocks):
            return
        knobs = {"target", "round_to", "scope", "block_keep", "widths", "depth", "blocks"}
        shape = prune.model_dump_json(include=knobs)
        channels, size, _ = config.data.image_shape
        given = config.upsample.channels(channels)
        kind = config.model.model_dump_json(), repr((channels, size, given)), shape
        if kind not in self._traced and len(self._traced) == MOST_NETWORKS:
            return
        self._traced.add(kind)
        refuse_out_of_reach(prune, _share_of_new(kind[0], channels, size, given, shape))


@lru_cache(maxsize=4 * MOST_NETWORKS)
def _share_of_new(model: str, channels: int, size: int, given: int, prune: str) -> float:
    """Return :func:`least_share` of a new network; 0 of its time. The sections are JSON, so that results can be kept.

    Raises:
        ConfigError: if a block cannot be removed.
    """
    section = ModelConfig.model_validate_json(model)
    # Classes are rows of an embedding, and no channels.
    network = UNet(section, size, channels, USUAL_CLASSES if section.class_conditional else 0, given)
    knobs = PruneConfig.model_validate_json(prune)
    check_blocks(network, knobs)
    return least_share(network, knobs) if knobs.target in COUNTED_TARGETS else 0.0
