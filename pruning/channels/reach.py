"""Whether a target of structured pruning can be reached: the narrowest network follows from shapes alone."""

from __future__ import annotations

from functools import lru_cache

import torch

from diffusion_core.config import CoreConfig, ModelConfig
from diffusion_core.model.cost import count_sizes, network_layers
from diffusion_core.model.unet import UNet
from pruning.channels.groups import channel_groups
from pruning.channels.levels import DIFFUSERS, LevelWidths
from pruning.channels.search import TOLERANCE, layer_sizes, out_of_reach, rounded, shrunk_sizes, wanted_counts
from pruning.config import COUNTED_TARGETS, PruneConfig
from pruning.estimate import USUAL_CLASSES

MOST_NETWORKS = 24
"""Kinds of networks that are traced for one sweep; a large one takes two seconds."""


def least_share(network: UNet, prune: PruneConfig) -> float:
    """Return the share of ``prune.target`` that is left at the narrowest widths that the knobs allow, in (0, 1].

    Args:
        network: the network to prune; its weights do not matter.
        prune: target, rounding, widths and shares by block. The target is not ``latency``, which has to be measured.
    """
    groups = channel_groups(network)
    layers, now = network_layers(network), layer_sizes(network)
    widths = {group.name: group.width for group in groups}
    alike = {group.name: torch.ones(group.width, dtype=torch.float64) for group in groups}
    wanted = wanted_counts(network, groups, alike, prune)
    levels = LevelWidths(network, groups) if prune.widths == DIFFUSERS else None
    narrowest = rounded(groups, wanted(1.0), prune.round_to or 1, widths, levels)
    what = COUNTED_TARGETS.index(prune.target)
    least = count_sizes(layers, shrunk_sizes(now, groups, narrowest, prune.widths))[what]
    return least / count_sizes(layers, now)[what]


def check_reach(network: UNet, prune: PruneConfig) -> None:
    """Check that structured pruning can reach its target with a network.

    Raises:
        ConfigError: if even the narrowest network costs more.
    """
    if prune.method != "structured" or prune.target not in COUNTED_TARGETS:
        return
    refuse_out_of_reach(prune, least_share(network, prune))


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
            ConfigError: if structured pruning cannot reach its target.
        """
        if prune.method != "structured" or prune.target not in COUNTED_TARGETS:
            return
        shape = prune.model_dump_json(include={"target", "round_to", "scope", "block_keep", "widths"})
        kind = config.model.model_dump_json(), repr(config.data.image_shape), shape
        if kind not in self._traced and len(self._traced) == MOST_NETWORKS:
            return
        self._traced.add(kind)
        channels, size, _ = config.data.image_shape
        refuse_out_of_reach(prune, _share_of_new(kind[0], channels, size, shape))


@lru_cache(maxsize=4 * MOST_NETWORKS)
def _share_of_new(model: str, channels: int, size: int, prune: str) -> float:
    """Return :func:`least_share` of a new network. The sections are JSON, so that results can be kept."""
    section = ModelConfig.model_validate_json(model)
    # Classes are rows of an embedding, and no channels.
    network = UNet(section, size, channels, USUAL_CLASSES if section.class_conditional else 0)
    return least_share(network, PruneConfig.model_validate_json(prune))
