"""Find channels that depend on each other: they are kept or removed together, in every layer that has them.

torch-pruning traces the dependencies. The results are plain data: names of layers, and positions in them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion_core.model.cost import example_inputs
from diffusion_core.model.structure import SIZES, sizes
from diffusion_core.model.unet import AttentionBlock, UNet

Side = Literal["out", "in"]


@dataclass(frozen=True)
class Member:
    """A layer that has the channels of a group.

    Attributes:
        layer: its name.
        side: ``out`` if the channels are outputs of the layer (also for norms and embeddings), ``in`` if inputs.
        places: positions of the group's channels in the layer, one per channel. A layer may be a member twice.
    """

    layer: str
    side: Side
    places: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are removed together: channel i is removed from all layers of the group, or from none.

    Attributes:
        name: the first layer, in the order of the network, with these channels as outputs.
        width: number of channels.
        heads: number of equal parts that must keep equally many channels (attention heads; else 1).
        members: all layers that have the channels.
    """

    name: str
    width: int
    heads: int
    members: tuple[Member, ...]


Kept = Mapping[str, Tensor]
"""Maps names of groups to bool tensors, ``(width,)``: True keeps the channel."""


def channel_groups(network: UNet) -> list[ChannelGroup]:
    """Return all groups of removable channels, in the order of the network. The image's channels are in no group."""
    import torch_pruning  # Slow to import, and only needed here.

    heads: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, AttentionBlock):
            heads |= dict.fromkeys((f"{name}.query", f"{name}.key", f"{name}.value"), module.heads)
    traced = copy.deepcopy(network).requires_grad_(True)  # Tracing follows the autograd graph.
    order = {name: i for i, (name, _) in enumerate(traced.named_modules())}
    names = {module: name for name, module in traced.named_modules()}
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(traced, example_inputs(traced))
    groups = []
    for found in graph.get_all_groups([traced.conv_out], (nn.Conv2d, nn.Linear)):
        members: set[Member] = set()
        for item in found:
            module = item.dep.target.module
            if type(module) in SIZES:
                side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
                # A layer has the same channels twice if its input is a concatenation of dependent tensors: a skip
                # connection, and the end of the residual stream that the skip connection started from.
                places: dict[int, list[int]] = {}
                for channel, place in zip(item.root_idxs, item.idxs, strict=True):
                    places.setdefault(channel, []).append(place)
                for repeat in zip(*(places[channel] for channel in sorted(places)), strict=True):
                    members.add(Member(names[module], side, repeat))
        ordered = tuple(sorted(members, key=lambda member: (order[member.layer], member.side, member.places)))
        giving = [
            m.layer for m in ordered if m.side == "out" and not isinstance(network.get_submodule(m.layer), nn.GroupNorm)
        ]
        parts = math.lcm(*(heads.get(layer, 1) for layer in giving))
        groups.append(ChannelGroup(giving[0], len(ordered[0].places), parts, ordered))
    return sorted(groups, key=lambda group: order[group.name])


def size_key(size: Mapping[str, int], side: Side) -> str:
    """Return the name of the size that counts the outputs or the inputs of a layer."""
    return next(key for key in size if key.startswith(("in_" if side == "in" else "out_", "num_channels", "embedding")))


def kept_places(network: UNet, groups: list[ChannelGroup], kept: Kept) -> dict[tuple[str, Side], Tensor]:
    """Return the positions to keep, in order, for every layer and side that loses channels."""
    stays: dict[tuple[str, Side], Tensor] = {}
    for group in groups:
        for member in group.members:
            module = network.get_submodule(member.layer)
            key = (member.layer, member.side)
            if key not in stays:
                size = sizes(module)
                stays[key] = torch.ones(size[size_key(size, member.side)], dtype=torch.bool)
            stays[key][torch.tensor(member.places)] &= kept[group.name].cpu()
    return {key: stay.nonzero()[:, 0] for key, stay in stays.items()}
