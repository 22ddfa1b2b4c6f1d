"""The report of a chain of tickets: a table, and plots of quality, sparsity by block, and overlap.

FOLDER/
    summary.json, summary.md   one row per round: remaining weights, quality, sparsity by block
    quality-*.png              quality against remaining weights, tickets and their controls
    blocks.png                 sparsity by block, round by round
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from diffusion_core.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from diffusion_core.files import write_json, write_text
from diffusion_core.report.plots import BLACK, BLUE, GREEN, SKY, VERMILION, marker, panels, plain, save
from diffusion_core.run_folder import CHECKPOINTS, RESULT_FILE, ROUNDS
from diffusion_core.tables import markdown_table
from pruning.lottery.tickets import chance_overlap, overlap
from pruning.masks.mask import MASKS_PART, WeightMasks, block_sparsity
from pruning.pruner import RECORD_KEY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICKET = "ticket"
NAMES = {"none": TICKET, "reinit": "random reinitialisation", "random_mask": "random mask"}
LINES = {TICKET: (BLUE, "o"), "random reinitialisation": (VERMILION, "s"), "random mask": (GREEN, "D")}
"""Colour and marker of each kind of stage."""
LABELS = {"val/loss": "validation loss", "eval/class_agreement": "class agreement"}


@dataclass(frozen=True)
class Trained:
    """The result of one stage of a chain.

    Attributes:
        round_number: number of the round; 0 is the dense network.
        kind: a value of ``NAMES``: ticket, or the name of a control.
        remaining: share of the maskable weights that its masks keep.
        figures: its figures by name, such as ``val/loss``.
        blocks: pruned share of the weights of each block.
    """

    round_number: int
    kind: str
    remaining: float
    figures: dict[str, float]
    blocks: dict[str, float]


def ticket_masks(checkpoint: Checkpoint) -> WeightMasks:
    """Return the masks in a checkpoint.

    Raises:
        CheckpointError: if there are none.
    """
    if MASKS_PART not in checkpoint.parts:
        raise CheckpointError(f"{str(checkpoint.path)!r}: no masks here; expected a network pruned by masks")
    return {name: mask.bool() for name, mask in checkpoint.tensors(MASKS_PART).items()}


def read_stages(folder: Path) -> list[Trained]:
    """Return the finished stages of the chain in a folder, tickets first, by round."""
    stages = []
    for result in sorted((folder / ROUNDS).glob(f"*/{RESULT_FILE}")):
        checkpoint = read_checkpoint(result.parent / CHECKPOINTS)
        figures = json.loads(result.read_text(encoding="utf-8"))["figures"]
        records = checkpoint.metadata["extra"].get(RECORD_KEY, [])
        if not records:
            stages.append(Trained(0, TICKET, 1.0, figures, {}))
            continue
        knobs = records[-1]["knobs"]
        stages.append(
            Trained(
                knobs["rounds"],
                NAMES[knobs["control"]],
                1.0 - records[-1]["sparsity"],
                figures,
                dict(sorted(block_sparsity(ticket_masks(checkpoint)).items(), key=lambda item: _position(item[0]))),
            )
        )
    return sorted(stages, key=lambda stage: (stage.kind != TICKET, stage.kind, stage.round_number))


def write_summary(folder: Path) -> dict[str, Path]:
    """Write the table and the plots of the chain in a folder. Return the plots, by the names to log them under."""
    stages = read_stages(folder)
    write_json(folder / "summary.json", [asdict(stage) for stage in stages])
    write_text(folder / "summary.md", table(stages))
    pictures = {}
    for key in LABELS:
        if any(key in stage.figures for stage in stages):
            name = key.replace("/", "-").replace("_", "-")
            pictures[f"lottery/plots/{name}"] = plot_quality(stages, key, folder / f"quality-{name}.png")
    tickets = [stage for stage in stages if stage.kind == TICKET and stage.blocks]
    if tickets:
        pictures["lottery/plots/blocks"] = plot_blocks(tickets, folder / "blocks.png")
    return pictures


def table(stages: Sequence[Trained]) -> str:
    """Return a Markdown table with one row per stage."""
    keys = [key for key in LABELS if any(key in stage.figures for stage in stages)]
    blocks = list(dict.fromkeys(block for stage in stages for block in stage.blocks))
    columns = ["round", "trained", "remaining", *(LABELS[key] for key in keys), *blocks]
    rows = []
    for stage in stages:
        cells = [str(stage.round_number), stage.kind if stage.round_number else "dense", f"{stage.remaining:.2%}"]
        cells += [f"{stage.figures[key]:.4f}" if key in stage.figures else "" for key in keys]
        cells += [f"{stage.blocks.get(block, 0.0):.1%}" for block in blocks]
        rows.append(cells)
    lines = markdown_table(columns, rows)
    if blocks:
        lines += ["", "The last columns are the share of each block's weights that is pruned."]
    return "\n".join(lines) + "\n"


def plot_quality(stages: Sequence[Trained], key: str, path: Path) -> Path:
    """Plot quality against the share of remaining weights, with one line for tickets and one per control."""
    figure, (axes,) = panels(7.0, 4.2)
    for kind, (colour, symbol) in LINES.items():
        points = [
            (stage.remaining, stage.figures[key]) for stage in stages if stage.kind == kind and key in stage.figures
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=symbol, label=kind, markersize=4, linewidth=1.5)
    dense = [stage.figures[key] for stage in stages if stage.round_number == 0 and key in stage.figures]
    if dense:
        axes.axhline(dense[0], color=BLACK, linewidth=0.8, linestyle=":", label="dense")
    _remaining_axis(axes, [stage.remaining for stage in stages])
    axes.set_ylabel(LABELS[key])
    axes.legend(frameon=False)
    return save(figure, path)


def plot_spread(chains: Sequence[Sequence[Trained]], key: str, title: str, path: Path) -> Path:
    """Plot the quality of chains with different seeds: mean and range against the share of remaining weights."""
    figure, (axes,) = panels(7.0, 4.2)
    for kind, (colour, symbol) in LINES.items():
        by_round: dict[int, list[Trained]] = {}
        for stage in (stage for chain in chains for stage in chain if stage.kind == kind and key in stage.figures):
            by_round.setdefault(stage.round_number, []).append(stage)
        if not by_round:
            continue
        rows = [stages for _, stages in sorted(by_round.items())]
        shares = [stages[0].remaining for stages in rows]
        values = [[stage.figures[key] for stage in stages] for stages in rows]
        axes.plot(
            shares, [sum(row) / len(row) for row in values], color=colour, marker=symbol, label=kind, markersize=4
        )
        axes.fill_between(shares, [min(row) for row in values], [max(row) for row in values], color=colour, alpha=0.15)
    _remaining_axis(axes, [stage.remaining for chain in chains for stage in chain])
    axes.set_ylabel(LABELS[key])
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    return save(figure, path)


def plot_blocks(stages: Sequence[Trained], path: Path) -> Path:
    """Plot the sparsity of each block against the share of remaining weights."""
    from matplotlib import colormaps

    figure, (axes,) = panels(7.5, 4.5)
    blocks = list(stages[0].blocks)
    colours = colormaps["viridis"]
    for index, block in enumerate(blocks):
        shade = colours(0.95 * index / max(1, len(blocks) - 1))
        points = [(stage.remaining, 100.0 * stage.blocks[block]) for stage in stages]
        axes.plot(*zip(*points, strict=True), marker=marker(index), color=shade, label=block,
                  markersize=4, linewidth=1.2)  # fmt: skip
    whole = [(stage.remaining, 100.0 * (1.0 - stage.remaining)) for stage in stages]
    axes.plot(*zip(*whole, strict=True), color=BLACK, linestyle=":", label="whole network")
    _remaining_axis(axes, [stage.remaining for stage in stages])
    axes.set_ylabel("pruned weights of the block (%)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save(figure, path)


def plot_overlap(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: tuple[str, str], folder: Path
) -> dict[str, float]:
    """Write overlap.png: the Jaccard index of two tickets by block, and that of equally sparse independent masks.

    Returns:
        The index by block, and ``all``.

    Raises:
        ValueError: if the tickets are not of the same network. Then nothing is written.
    """
    shares, chance = overlap(first, second), chance_overlap(first, second)
    figure, (axes,) = panels(7.0, 3.8)
    blocks = sorted(shares, key=_position)
    axes.bar(blocks, [shares[key] for key in blocks], width=0.6, color=SKY, label="measured")
    axes.plot(blocks, [chance[key] for key in blocks], "_", color=BLACK, markersize=22, label="by chance")
    axes.set_ylabel("weights in both / in either")
    axes.set_ylim(0.0, 1.0)
    axes.set_title(plain(f"{names[0]} and {names[1]}"), fontsize=9)
    axes.tick_params(axis="x", labelrotation=40)
    axes.legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    save(figure, folder / "overlap.png")
    return {key: shares[key] for key in blocks}


def _position(block: str) -> tuple[int, str]:
    """Return the sort key of a block in plots: the order of the network, with ``all`` last."""
    order = ("time_mlp", "conv_in", "down", "middle", "up", "conv_out", "all")
    return order.index(block.partition(".")[0]), block


def _remaining_axis(axes: Axes, shares: Sequence[float]) -> None:
    """Draw the axis of remaining weights: dense at the left, sparse at the right, a factor of two per tick."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(1.1, min(shares) / 1.1)
    ticks = [2.0**-n for n in range(16) if 2.0**-n >= min(shares) / 1.1]
    axes.set_xticks(ticks, [f"{100.0 * tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("remaining weights (%)")
