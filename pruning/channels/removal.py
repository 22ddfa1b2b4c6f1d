"""Structured pruning: remove whole channels, which makes the network smaller, and repeat what was removed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.config import ConfigError
from diffusion_core.model.cost import LATENCY_BATCH, count_cost, count_sizes, latencies, network_layers
from diffusion_core.model.depth import remove_blocks
from diffusion_core.model.structure import resize
from diffusion_core.model.unet import AttentionBlock, UNet
from diffusion_core.randomness import Purpose, stream_seed
from pruning.blocks import shared_blocks
from pruning.calibration import Calibration
from pruning.channels.groups import ChannelGroup, Kept, channel_groups, kept_places
from pruning.channels.importance import channel_scores
from pruning.channels.levels import kept_time_features
from pruning.channels.search import STEPS, Counts, choose_all, find_counts, layer_sizes, shrunk_sizes
from pruning.config import COUNTED_TARGETS, PruneConfig
from pruning.registries import IMPORTANCES

LATENCY_STEPS = 8
"""Number of bisections if each needs a measurement."""


@dataclass(frozen=True)
class Removal:
    """The channels to keep, as plain JSON. Together with the dense network, this is enough to repeat the pruning.

    Attributes:
        kept: a string for every group of channels: ``1`` for each channel to keep, ``0`` for each channel to remove;
            empty: all channels stay.
        redrawn: the seed with which the weights of the smaller network were drawn anew, or None.
        widths: ``prune.widths``, which decides about groups of norms and features of timesteps.
        blocks: names of the blocks that were removed before. The groups are those of the network without them.
    """

    kept: dict[str, str]
    redrawn: int | None = None
    widths: str = "free"
    blocks: list[str] = field(default_factory=list)


def prune_channels(
    network: UNet,
    prune: PruneConfig,
    seed: int = 0,
    calibration: Calibration | None = None,
    progress: bool = False,
    reference: UNet | None = None,
) -> tuple[UNet, Removal]:
    """Remove the least important channels until ``prune.keep`` of ``prune.target`` is left.

    Attention keeps its heads, and the image its channels. The groups of a group norm become the greatest common divisor
    of their old number and the new width.

    Args:
        network: the network to prune; it does not change.
        prune: how much to keep, and how to rank channels.
        seed: seed of the importances ``random`` and ``reinit``.
        calibration: training images, for importances with gradients.
        progress: show a progress bar.
        reference: the network whose cost ``prune.keep`` refers to; None: this one.

    Returns:
        The smaller network, in the same mode and on the same device, and the record with which to repeat the pruning.

    Raises:
        ConfigError: if the target is out of reach, or ``prune.block_keep`` does not have one share per block.
    """
    groups = channel_groups(network)
    blocks = shared_blocks(len(network.down))
    if prune.block_keep and len(prune.block_keep) != len(blocks):
        raise ConfigError(
            f"prune.block_keep = {prune.block_keep}: expected {len(blocks)} shares, for {', '.join(blocks)}"
        )
    kept: Kept = {group.name: torch.ones(group.width, dtype=torch.bool) for group in groups}
    for iteration in range(1, prune.iterations + 1):
        current = shrink(network, groups, kept, prune.widths).eval().requires_grad_(True)
        narrowed = channel_groups(current) if iteration > 1 else groups
        scores = channel_scores(current, narrowed, prune, stream_seed(seed, iteration), calibration)
        # Approach the target in equal ratios, all relative to the original network, so that rounding does not add up.
        keep = prune.keep ** (iteration / prune.iterations)
        cost, target = _cost_to_hit(network, groups, prune, keep, reference or network)
        full = {
            group.name: torch.full((group.width,), -math.inf, dtype=torch.float64).masked_scatter(
                kept[group.name], scores[group.name]
            )
            for group in groups
        }
        steps = LATENCY_STEPS if prune.target == "latency" else STEPS
        counts = find_counts(network, groups, full, prune, cost, target, steps, progress)
        kept = choose_all(network, groups, full, counts)
    removal = Removal(
        {name: "".join("01"[stays] for stays in stay.tolist()) for name, stay in kept.items()},
        stream_seed(seed, Purpose.REINIT) if IMPORTANCES[prune.importance].redraws else None,
        prune.widths,
    )
    return _apply(network, groups, removal), removal


def remove(network: UNet, removal: Removal) -> UNet:
    """Prune a network according to a record.

    Raises:
        ValueError: if the record is of another network.
    """
    if removal.blocks:
        network = copy.deepcopy(network)
        remove_blocks(network, removal.blocks)
    groups = channel_groups(network)
    kept = removal.kept or {group.name: "1" * group.width for group in groups}
    if {name: len(marks) for name, marks in kept.items()} != {group.name: group.width for group in groups}:
        raise ValueError("the record is one of another network: groups of channels or their widths differ")
    return _apply(network, groups, replace(removal, kept=kept))


def _apply(network: UNet, groups: list[ChannelGroup], removal: Removal) -> UNet:
    kept = {name: torch.tensor([mark == "1" for mark in marks]) for name, marks in removal.kept.items()}
    smaller = shrink(network, groups, kept, removal.widths)
    if removal.redrawn is not None:
        _draw_weights(smaller, removal.redrawn)
    return smaller


def _cost_to_hit(
    network: UNet, groups: list[ChannelGroup], prune: PruneConfig, keep: float, reference: UNet
) -> tuple[Callable[[Counts], float], float]:
    """Return the cost of a network with given numbers of channels, in the target's unit, and the cost to reach.

    ``keep`` is a share of the cost of ``reference``.
    """
    if prune.target == "latency":

        def ratio(counts: Counts) -> float:
            ours, theirs = latencies(
                [untrained(network, groups, counts, prune.widths), reference], LATENCY_BATCH, least=3
            )
            return ours / theirs

        return ratio, keep
    layers, now = network_layers(network), layer_sizes(network)
    unit = COUNTED_TARGETS.index(prune.target)

    def count(counts: Mapping[str, int]) -> float:
        return count_sizes(layers, shrunk_sizes(now, groups, counts, prune.widths))[unit]

    return count, keep * getattr(count_cost(reference), prune.target)


def untrained(network: UNet, groups: list[ChannelGroup], counts: Counts, widths: str) -> UNet:
    """Return a network of these widths, with arbitrary weights."""
    first = {group.name: torch.arange(group.width) < counts[group.name] for group in groups}
    return shrink(network, groups, first, widths)


def shrink(network: UNet, groups: list[ChannelGroup], kept: Kept, widths: str) -> UNet:
    """Return a copy of a network with only the channels to keep."""
    smaller = copy.deepcopy(network)
    counts = {group.name: int(kept[group.name].sum()) for group in groups}
    now = layer_sizes(network)
    new_sizes = {name: size for name, size in shrunk_sizes(now, groups, counts, widths).items() if size != now[name]}
    places = kept_places(network, groups, kept)
    if "in_features" in new_sizes.get("time_mlp.0", {}):
        places["time_mlp.0", "in"] = torch.tensor(kept_time_features(network, new_sizes["time_mlp.0"]["in_features"]))
    modules = dict(smaller.named_modules())
    weights: dict[str, Tensor] = {}
    for name in {layer for layer, _ in places}:
        module = modules[name]
        for key, parameter in module.named_parameters():
            value = parameter.detach()
            for side in ("out", "in"):
                if (name, side) not in places or (side == "in" and key == "bias"):
                    continue
                axis = 1 if side == "in" or isinstance(module, nn.Embedding) else 0
                if (name, side) == ("time_mlp.0", "in"):
                    value = F.pad(value, (0, 1))  # For frequencies that it has not.
                value = value.index_select(axis, places[name, side].to(value.device))
            weights[f"{name}.{key}"] = value.clone()
    trains = {name: parameter.requires_grad for name, parameter in smaller.named_parameters()}
    resize(smaller, new_sizes)
    for name, value in weights.items():
        layer, _, key = name.rpartition(".")
        setattr(modules[layer], key, nn.Parameter(value, requires_grad=trains[name]))
    for name, module in network.named_modules():
        if isinstance(module, AttentionBlock):
            query = smaller.get_submodule(f"{name}.query")
            assert isinstance(query, nn.Linear)
            # Attention divides by the root of a head's width. Scale queries so that the old width still applies.
            scale = math.sqrt(query.out_features / module.query.out_features)
            if scale != 1.0:
                query.weight.data.mul_(scale)
                query.bias.data.mul_(scale)
    return smaller


def _draw_weights(network: UNet, seed: int) -> None:
    """Draw all weights anew, as for an untrained network of these widths."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = copy.deepcopy(network).cpu()
        for module in fresh.modules():
            if isinstance(module, nn.GroupNorm | nn.Embedding | nn.Conv2d | nn.Linear):
                module.reset_parameters()
        fresh.reset_parameters()
    network.load_state_dict(fresh.state_dict())
