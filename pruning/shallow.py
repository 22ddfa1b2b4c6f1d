"""Networks without some of their blocks, as the knobs of pruning say: ``prune.blocks``, ``prune.block_keep``."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from diffusion_core.config import ConfigError
from diffusion_core.model.cost import count_cost, count_sizes, network_layers
from diffusion_core.model.depth import removable_blocks, removal_problem, remove_blocks, residual_blocks
from diffusion_core.model.structure import sizes
from diffusion_core.model.unet import UNet
from pruning.blocks import block_of, block_shares
from pruning.config import COUNTED_TARGETS, PruneConfig


def check_blocks(network: UNet, prune: PruneConfig) -> None:
    """Check that the blocks of ``prune.blocks`` can be removed.

    Raises:
        ConfigError: if they cannot.
    """
    if prune.blocks and (problem := removal_problem(network, prune.blocks)):
        raise ConfigError(f"prune.blocks = {prune.blocks}: {problem}")


def shallower(network: UNet, blocks: Iterable[str]) -> UNet:
    """Return a copy of a network without some blocks."""
    copied = copy.deepcopy(network)
    remove_blocks(copied, blocks)
    return copied


def candidates(network: UNet, prune: PruneConfig) -> list[str]:
    """Return the blocks that may be removed besides those of ``prune.blocks``: not where ``prune.block_keep`` is 1."""
    shares = block_shares(prune.block_keep, len(network.down))
    return [
        name
        for name in removable_blocks(network)
        if name not in prune.blocks and shares.get(block_of(name), 0.0) != 1.0
    ]


def shallowest(network: UNet, prune: PruneConfig) -> UNet:
    """Return the network without all blocks that may be removed. One residual block stays, the cheapest."""
    gone = [*prune.blocks, *candidates(network, prune)]
    if set(residual_blocks(network)) <= set(gone):
        open_blocks = [name for name in residual_blocks(network) if name not in prune.blocks]
        saved = savings(network, open_blocks, prune)
        gone.remove(min(open_blocks, key=lambda name: saved[name]))
    return shallower(network, gone)


def counted(network: UNet, prune: PruneConfig) -> int:
    """Return the cost of a network in the unit of ``prune.target``; multiply-accumulates in place of time."""
    return getattr(count_cost(network), _unit(prune))


def savings(network: UNet, blocks: Iterable[str], prune: PruneConfig) -> dict[str, int]:
    """Return what the removal of each block saves, as :func:`counted` counts. Savings of several blocks add up."""
    layers = network_layers(network)
    widths = {name: sizes(network.get_submodule(name)) for name in layers}
    saved = {}
    for block in blocks:
        gone = {name: layer for name, layer in layers.items() if name.startswith(f"{block}.")}
        gone.pop(f"{block}.skip", None)
        saved[block] = count_sizes(gone, widths)[COUNTED_TARGETS.index(_unit(prune))]
    return saved


def _unit(prune: PruneConfig) -> str:
    return prune.target if prune.target in COUNTED_TARGETS else "macs"
