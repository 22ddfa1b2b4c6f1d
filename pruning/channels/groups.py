"""Which channels of a network depend on one another: they stay or go together, in every layer that holds them.

torch-pruning traces the dependencies. What comes out of it here is plain: names of layers and positions in them.
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
    """A layer that holds a group's channels.

    Attributes:
        layer: its name.
        side: whether they are among what it gives (also for norms and embeddings) or among what it takes.
        places: where the group's channels are in it, one place a channel; a layer may be a member twice.
    """

    layer: str
    side: Side
    places: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are numbered alike in all layers of the group; channel i goes from all of them or from none.

    Attributes:
        name: the first layer, in the network's own order, that gives these channels.
        width: how many there are.
        heads: as many channels must stay of each of that many equal parts (attention heads; else 1).
        members: every layer that holds them.
    """

    name: str
    width: int
    heads: int
    members: tuple[Member, ...]


Kept = Mapping[str, Tensor]
"""Name of a group to a bool tensor ``(width,)``: True stays."""


def channel_groups(network: UNet) -> list[ChannelGroup]:
    """All groups of a network whose channels may go, in the order of its layers; the image's channels are in none."""
    import torch_pruning  # Slow to import, and only needed here.

    heads: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, AttentionBlock):
            heads |= dict.fromkeys((f"{name}.query", f"{name}.key", f"{name}.value"), module.heads)
    traced = copy.deepcopy(network).requires_grad_(True)  # Tracing follows the graph of gradients.
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
                # A layer holds channels twice where it is given a tensor beside itself: a skip connection to the end
                # of the very residual stream that it started from.
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
    """The name of the size that counts what a layer gives or takes."""
    return next(key for key in size if key.startswith(("in_" if side == "in" else "out_", "num_channels", "embedding")))


def kept_places(network: UNet, groups: list[ChannelGroup], kept: Kept) -> dict[tuple[str, Side], Tensor]:
    """Of every layer and side that loses channels, the positions that stay, in order."""
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
