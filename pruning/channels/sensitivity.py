"""How much the loss rises when each block alone is narrowed, and the shares of blocks that follow from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_core.config import ConfigError
from diffusion_core.files import replaced_file, write_json
from diffusion_core.model.cost import count_sizes, network_layers
from diffusion_core.model.structure import Structure
from diffusion_core.model.unet import UNet
from diffusion_core.tables import text_table
from pruning.blocks import shared_blocks
from pruning.calibration import Calibration
from pruning.channels.groups import ChannelGroup, channel_groups
from pruning.channels.importance import channel_scores
from pruning.channels.removal import prune_channels, shrink
from pruning.channels.search import (
    Counts,
    block_share,
    choose_all,
    layer_sizes,
    norm_groups,
    round_counts,
    shrunk_sizes,
)
from pruning.config import COUNTED_TARGETS, PruneConfig

SHARES = (0.75, 0.5, 0.25, 0.1)
"""Shares of its channels that a block is narrowed to."""
BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weights of the shares that follow from single blocks, relative to even shares, that are tried."""
FREE = "free"
"""Value of ``prune.widths`` with which blocks are narrowed one by one."""
STEP = 0.05
"""Smallest difference of two proposed shares, and the smallest share."""


@dataclass(frozen=True)
class Sensitivity:
    """Losses of a network in which one block is narrowed.

    Attributes:
        dense: loss of the network itself.
        losses: by block of ``prune.block_keep``, losses of the network with fewer and fewer of its channels.
        kept: by block, the share of its channels at each of these losses. They are close to :data:`SHARES`, as far as
            widths are rounded; shares that are rounded to the same widths are one.
    """

    dense: float
    losses: dict[str, list[float]]
    kept: dict[str, list[float]]

    def rise(self, block: str, share: float) -> float:
        """Return by how much the loss rises if a block keeps a share of its channels: linear between measured shares.

        Never less than at a larger share. Below the smallest measured share, the last line goes on.
        """
        shares, rises = [1.0], [0.0]
        for measured, loss in zip(self.kept[block], self.losses[block], strict=True):
            shares.append(measured)
            rises.append(max(rises[-1], loss - self.dense))
        low = next((i for i, known in enumerate(shares) if known <= share), len(shares) - 1)
        if low == 0:
            return 0.0
        slope = (rises[low] - rises[low - 1]) / (shares[low - 1] - shares[low])
        return rises[low - 1] + slope * (shares[low - 1] - share)


def measure_sensitivity(network: UNet, prune: PruneConfig, seed: int, calibration: Calibration) -> Sensitivity:
    """Narrow each block alone, and measure the training loss over ``prune.calibration_batches`` batches.

    The channels that go are the weakest by ``prune.importance``. All losses are measured with equal noisy images.

    Args:
        network: the network; it does not change.
        prune: importance, rounding, and number of batches.
        seed: seed of random importances.
        calibration: the training images.
    """
    groups = channel_groups(network)
    scores = channel_scores(network, groups, prune, seed, calibration)
    blocks = shared_blocks(len(network.down))
    kept: dict[str, list[float]] = {block: [] for block in blocks}
    networks: dict[Hashable, UNet] = {None: copy.deepcopy(network).eval()}
    for index, block in enumerate(blocks):
        only = [float(i == index) for i in range(len(blocks))]
        own = [group for group in groups if block_share(network, group, only)]
        for share in SHARES:
            counts = counts_at(network, groups, prune, [share if i == index else 1.0 for i in range(len(blocks))])
            left = sum(counts[group.name] for group in own) / sum(group.width for group in own)
            if left < min(kept[block], default=1.0):
                kept[block].append(left)
                chosen = choose_all(network, groups, scores, counts)
                networks[block, left] = shrink(network, groups, chosen, FREE).eval()
    losses = mean_losses(networks, prune.calibration_batches, calibration)
    return Sensitivity(losses[None], {block: [losses[block, left] for left in kept[block]] for block in blocks}, kept)


@torch.no_grad()
def mean_losses(networks: Mapping[Hashable, UNet], batches: int, calibration: Calibration) -> dict[Hashable, float]:
    """Return the mean training loss of each network, in evaluation mode, on equal batches of noisy images."""
    total = dict.fromkeys(networks, 0.0)
    for index in calibration.indices(batches, "losses"):
        for key, one in networks.items():
            parts = calibration.parts(calibration.draws(index, one))
            for part in parts:
                total[key] += float(calibration.loss(one, part).mean()) / (batches * len(parts))
    return total


def counts_at(network: UNet, groups: list[ChannelGroup], prune: PruneConfig, shares: Sequence[float]) -> Counts:
    """Return the channels of each group if every block keeps a share, rounded as pruning rounds them."""
    unit = prune.round_to or norm_groups(network)
    wanted = {group.name: group.width * block_share(network, group, list(shares)) for group in groups}
    return round_counts(groups, wanted, unit, {group.name: group.width for group in groups})


def proposed_shares(network: UNet, prune: PruneConfig, measured: Sensitivity) -> dict[str, float]:
    """Return shares of blocks with which ``prune.keep`` of ``prune.target`` is left, and the loss should rise least.

    Rises of several blocks are taken to add up. Starting from the whole network, the block whose next step saves most
    for the rise of its loss is narrowed, again and again. Multiply-accumulates stand in for time.

    Args:
        network: the network that was measured.
        prune: target and share to keep.
        measured: result of :func:`measure_sensitivity`.
    """
    groups, layers, now = channel_groups(network), network_layers(network), layer_sizes(network)
    unit = COUNTED_TARGETS.index(prune.target if prune.target in COUNTED_TARGETS else "macs")

    def cost(shares: Mapping[str, float]) -> float:
        return count_sizes(layers, _sizes_at(network, groups, now, list(shares.values())))[unit]

    shares = dict.fromkeys(measured.losses, 1.0)
    whole = left = cost(shares)
    while left > prune.keep * whole:
        steps = []
        for block, share in shares.items():
            if measured.kept[block] and share > 1.5 * STEP:
                less = round(share - STEP, 2)
                saved = left - cost(shares | {block: less})
                risen = measured.rise(block, less) - measured.rise(block, share)
                if saved > 0:
                    steps.append((risen / saved, block, less))
        if not steps:
            break
        _, block, less = min(steps)
        shares[block] = less
        left = cost(shares)
    return shares


def _sizes_at(network: UNet, groups: list[ChannelGroup], now: Structure, shares: list[float]) -> Structure:
    """Return the sizes of layers if blocks keep these shares, to one channel."""
    counts = {group.name: max(1, round(group.width * block_share(network, group, shares))) for group in groups}
    return shrunk_sizes(now, groups, counts, FREE)


def plot_sensitivity(measured: Sensitivity, file: Path) -> None:
    """Plot the loss against the share of channels that each block alone keeps, as a PNG."""
    from matplotlib.figure import Figure  # Slow to import; without pyplot, it needs no display.

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for block, losses in measured.losses.items():
        axes.plot([1.0, *measured.kept[block]], [measured.dense, *losses], marker="o", markersize=4, label=block)
    axes.set_xlabel("share of its channels that one block keeps")
    axes.set_ylabel("training loss")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with replaced_file(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def blended_shares(proposed: Mapping[str, float], blend: float) -> dict[str, float]:
    """Return shares between even ones (``blend`` 0) and the proposed ones (1), by the shares that are removed."""
    even = sum(1.0 - share for share in proposed.values()) / len(proposed)
    return {name: round(1.0 - (1.0 - blend) * even - blend * (1.0 - share), 3) for name, share in proposed.items()}


def study_sensitivity(
    network: UNet, prune: PruneConfig, seed: int, calibration: Calibration, folder: Path
) -> dict[str, Any]:
    """Measure, propose shares, and write ``sensitivity.json`` and ``sensitivity.png`` into a folder.

    Rises of the loss do not quite add up. So networks that are pruned with even shares, with those of
    :func:`proposed_shares`, and with :data:`BLENDS` of both are measured, and the best shares are proposed.

    Returns:
        The content of the JSON file: what was measured, the proposed shares, and the knob that sets them.

    Raises:
        ConfigError: if the target is out of reach.
    """
    measured = measure_sensitivity(network, prune, seed, calibration)
    alone = proposed_shares(network, prune, measured)
    pruned: dict[Hashable, UNet] = {}
    for blend in BLENDS:
        shares = list(blended_shares(alone, blend).values())
        wanted = prune.model_copy(update={"scope": "layer", "block_keep": shares, "widths": FREE})
        try:
            pruned[blend] = prune_channels(network, wanted, seed, calibration)[0].eval()
        except ConfigError:  # A block that is spared may leave too much.
            if blend == 0.0:
                raise
    whole = mean_losses(pruned, prune.calibration_batches, calibration)
    blend = min(BLENDS, key=lambda blend: whole.get(blend, math.inf))
    proposed = blended_shares(alone, blend)
    result = {
        **{name: getattr(prune, name) for name in ("target", "keep", "importance", "calibration_batches")},
        **asdict(measured),
        "pruned": {f"{blend:g}": whole[blend] for blend in BLENDS if blend in whole},
        "blend": blend,
        "proposed": proposed,
        "knob": f"--prune.block_keep={','.join(f'{share:g}' for share in proposed.values())}",
        "plot": str(folder / "sensitivity.png"),
    }
    plot_sensitivity(measured, folder / "sensitivity.png")
    write_json(folder / "sensitivity.json", result)
    return result


def describe_sensitivity(result: Mapping[str, Any]) -> str:
    """Return a result of :func:`study_sensitivity` as a table and notes."""
    most = max(map(len, result["losses"].values()))
    rows = []
    for block, losses in result["losses"].items():
        cells = [f"{share:.0%}: {loss:.4f}" for share, loss in zip(result["kept"][block], losses, strict=True)]
        rows.append([block, *cells, *[""] * (most - len(cells)), f"{result['proposed'][block]:g}"])
    table = text_table(["block", *["kept: loss"] * most, "proposed share"], rows, right=True)
    even, best = result["pruned"]["0"], min(result["pruned"].values())
    pruned = f"{even:.4f} with even shares, {best:.4f} with these"
    notes = f"loss: {result['dense']:.4f}; pruned to the target, without training: {pruned}"
    return "\n".join([table, notes, result["knob"], result["plot"]])
