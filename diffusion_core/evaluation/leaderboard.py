"""Checkpoints in one table, with their costs and figures, and how these were measured.

All figures of a row were measured on its checkpoint: while its run trained, at that step, or by scripts/evaluate.py.
Those of images are of one sampling, which is also the one that a row's costs are of. Each other sampling that a
checkpoint was evaluated with has a row of its own.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_core.checkpoint import CheckpointError, list_checkpoints, read_checkpoint, step_folder, step_of
from diffusion_core.choice import wanted_step
from diffusion_core.config.metrics import best_first, goal_of
from diffusion_core.evaluation.protocol import PREFIX, sampling_of
from diffusion_core.evaluation.record import EVALUATION_FILE, OF_IMAGES
from diffusion_core.files import write_csv, write_json
from diffusion_core.messages import UserError, reason_of
from diffusion_core.run_folder import CHECKPOINTS, PROTOCOLS_FILE, RESULT_FILE, read_history, without_step
from diffusion_core.sampling.cost import EVALUATIONS, MACS, SECONDS
from diffusion_core.tables import cell, text_table
from diffusion_core.terminal.wrapping import wrapped
from diffusion_core.tracking import BEST, STEP

COSTS = {
    "parameters": "model/params",
    "MACs": "model/macs",
    "MACs with attention": "model/macs_with_attention",
    "latency": "model/latency",
    "evaluations an image": EVALUATIONS,
    "MACs an image": MACS,
    "seconds an image": SECONDS,
}
"""Columns of costs, and the figure in each."""

COST_PREFIX = "model/"
"""Prefix of the costs of a network."""
IMAGES_PREFIX = "eval/"
"""Prefix of figures of images."""
QUALITY_PREFIXES = ("val/loss", IMAGES_PREFIX)
CHAIN_PREFIX = "lottery/"
"""Prefix of the figures that a chain of runs has in its own history."""
FILE = "leaderboard"
UNKNOWN_STEP = "rows without a step: the best values of the run, which may be those of several checkpoints"


@dataclass(frozen=True)
class Entry:
    """A checkpoint on the leaderboard.

    Attributes:
        model: its run's id or name.
        step: its step; None if it is unknown, and the figures are the best values of the run.
        costs: known costs by column.
        figures: figures of quality by name, all measured on it; each has a goal, lower or higher.
        protocols: how the figures were measured, by their names.
    """

    model: str
    step: int | None
    costs: dict[str, float]
    figures: dict[str, float]
    protocols: dict[str, str]


def entry(
    model: str,
    step: int | None,
    costs: Mapping[str, Any],
    figures: Mapping[str, Any],
    protocols: Mapping[str, str],
) -> Entry:
    """Return a checkpoint's entry.

    Args:
        model: its run's id or name.
        step: its step, if it is known.
        costs: figures that include the costs of its network, such as all of its run.
        figures: figures that were measured on it.
        protocols: how figures were measured.
    """
    known = {column: costs.get(figure) for column, figure in COSTS.items()}
    found = {column: value for column, value in known.items() if isinstance(value, int | float)}
    quality = {
        name: float(value)
        for name, value in figures.items()
        if name.startswith(QUALITY_PREFIXES) and goal_of(name) and isinstance(value, int | float)
    }
    return Entry(model, step, found, quality, {name: line for name, line in protocols.items() if name in quality})


def from_folders(roots: Sequence[Path], which: str = BEST) -> Iterator[Entry]:
    """Yield checkpoints of the finished runs below some folders, with the figures that were measured on each of them.

    Of each run that is the checkpoint that ``which`` chooses, as in :mod:`diffusion_core.choice`, and with ``best`` and
    ``newest`` also those that scripts/evaluate.py measured.

    Raises:
        CheckpointError: if ``which`` is neither ``best``, ``newest`` nor a step.
    """
    step = wanted_step(which)
    for file in sorted(file for root in roots for file in root.rglob(RESULT_FILE)):
        try:
            yield from _entries_of(file.parent, json.loads(file.read_text(encoding="utf-8")), which, step)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            print(f"{file}: skipped, it is damaged", file=sys.stderr)


def from_models(
    run_id: str, summary: Mapping[str, Any], models: Sequence[Mapping[str, Any]], which: str
) -> list[Entry]:
    """Return the entries of a run on W&B: one for each sampling that its chosen checkpoint was measured with.

    A run without a checkpoint, or with one without figures, has those of its summary, and no step. One without costs
    of its network, or without the step that ``which`` names, has no entry.

    Args:
        run_id: names the run.
        summary: the run's flat summary. Its costs are those of the last network.
        models: metadata of the run's `model` artifacts, the one that ``which`` chooses first, then the newest.
        which: as in :mod:`diffusion_core.choice`.

    Raises:
        CheckpointError: if ``which`` is neither ``best``, ``newest`` nor a step.
    """
    if not any(name.startswith(COST_PREFIX) for name in summary) or (wanted_step(which) is not None and not models):
        return []
    lines = {key.removeprefix(PREFIX): str(line) for key, line in summary.items() if key.startswith(PREFIX)}
    if not models or "figures" not in models[0]:
        return [entry(run_id, None, summary, summary, lines)]
    model, newest = models[0], models[-1]
    known = summary if _network(model) == _network(newest) else {}
    later = dict(model.get("protocols", {}))  # Of figures that were measured after the training.
    figures = dict(model["figures"])
    trained = {name: value for name, value in figures.items() if name not in later} | _costs(known)
    network = {name: value for name, value in known.items() if not name.startswith(OF_IMAGES)}
    rows = _by_sampling((trained, lines), ({name: value for name, value in figures.items() if name in later}, later))
    return [entry(run_id, model.get("step"), network | _costs(found), found, said) for found, said in rows]


def _network(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the metadata of a `model` artifact say of its network: how it was pruned and distilled."""
    return {key: value for key, value in model.items() if key not in ("step", "config", "figures", "protocols")}


def _entries_of(folder: Path, result: Mapping[str, Any], which: str, step: int | None) -> list[Entry]:
    """Return the entries of a run."""
    history = {row[STEP]: without_step(row) for row in read_history(folder)}
    if any(name.startswith(CHAIN_PREFIX) for row in history.values() for name in row):
        return []  # A lottery: its rounds are runs below its folder.
    written = {place: step_of(place) for place in list_checkpoints(folder / CHECKPOINTS)}
    evaluated = {number: place / EVALUATION_FILE for place, number in written.items() if number is not None}
    evaluated = {number: file for number, file in evaluated.items() if file.is_file()}
    if step is not None:
        steps = [step] if step in history or step in evaluated else []
    else:
        named = step_of(Path(result["best_checkpoint"])) if which == BEST else None
        chosen = int(result["step"]) if named is None else named
        steps = [chosen, *(number for number in evaluated if number != chosen)]
    protocols = json.loads(_text(folder / PROTOCOLS_FILE))
    entries = []
    for number in steps:
        judged = json.loads(_text(evaluated[number])) if number in evaluated else {}
        # The costs are those of the last network. Pruning forgets which checkpoint was the best before it.
        is_last = number in steps[: step is None] or _have_equal_networks(folder, number, int(result["step"]))
        trained = history.get(number, {}) | (_costs(result["figures"]) if is_last else {})
        network = {name: value for name, value in dict(result["figures"]).items() if not name.startswith(OF_IMAGES)}
        rows = _by_sampling((trained, protocols), (judged.get("figures", {}), judged.get("protocols", {})))
        entries += [
            entry(str(result["run_id"]), number, (network if is_last else {}) | _costs(figures), figures, lines)
            for figures, lines in rows
        ]
    return entries


def _costs(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return what images cost."""
    return {name: value for name, value in figures.items() if name.startswith(OF_IMAGES)}


UNKNOWN = "unknown"
"""The sampling of images whose protocols do not say it."""
Measured = tuple[Mapping[str, Any], Mapping[str, str]]
"""Figures and their protocols."""


def _by_sampling(*sources: Measured) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Return figures and protocols of one checkpoint for each sampling of its images, in the order of their sources.

    A later source replaces figures of an earlier one. Figures of no sampling, such as losses, are in all of them.

    Args:
        sources: each was measured with one sampling, unless protocols say otherwise.
    """
    found: dict[str | None, tuple[dict[str, Any], dict[str, str]]] = {}
    for figures, protocols in sources:
        own = next(filter(None, map(sampling_of, protocols.values())), UNKNOWN)
        for name, value in figures.items():
            line = protocols.get(name)
            of_images = name.startswith((OF_IMAGES, IMAGES_PREFIX))
            sampling = sampling_of(line or "") or own if of_images else None
            values, lines = found.setdefault(sampling, ({}, {}))
            values[name] = value
            lines |= {} if line is None else {name: line}
    common, common_lines = found.pop(None, ({}, {}))
    judged = [ways for ways in found.values() if any(name.startswith(IMAGES_PREFIX) for name in ways[0])]
    return [(common | values, common_lines | lines) for values, lines in judged or [*found.values(), ({}, {})][:1]]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else "{}"


def _have_equal_networks(folder: Path, *steps: int) -> bool:
    """Return whether checkpoints of a run were pruned and distilled equally; False if they are not on the disk."""
    try:
        found = [read_checkpoint(folder / CHECKPOINTS / step_folder(step), verify=False).metadata for step in steps]
    except CheckpointError:
        return False
    one, *others = [(metadata["structure"], metadata["extra"]) for metadata in found]
    return all(other == one for other in others)


def ordered(entries: Sequence[Entry], metric: str | None) -> list[Entry]:
    """Return the entries by a figure, best first; then those without it."""
    return best_first(entries, metric, lambda item: item.figures)


def rows_of(entries: Sequence[Entry]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return columns and rows by column: model, step, costs, figures, and the protocol beside each that has one."""
    costs = [column for column in COSTS if any(column in item.costs for item in entries)]
    figures = list(dict.fromkeys(name for item in entries for name in item.figures))
    columns = ["model", "step", *costs]
    for name in figures:
        columns += [name, *([f"{PREFIX}{name}"] if any(name in item.protocols for item in entries) else [])]
    rows = []
    for item in entries:
        protocols = {f"{PREFIX}{name}": line for name, line in item.protocols.items()}
        rows.append({"model": item.model, "step": item.step, **item.costs, **item.figures, **protocols})
    return columns, rows


def show(entries: Sequence[Entry]) -> str:
    """Return the leaderboard as text. Protocols are numbered notes below it.

    A note's number is in the head of its column, or behind a figure if the column's figures were measured in different
    ways.
    """
    columns, rows = rows_of(entries)
    lines = list(dict.fromkeys(line for item in entries for line in item.protocols.values()))

    def note(line: str | None) -> str:
        return "" if line is None else f" [{lines.index(line) + 1}]"

    shown = [column for column in columns if not column.startswith(PREFIX)]
    ways = {column: [row.get(f"{PREFIX}{column}") for row in rows if column in row] for column in shown}
    heads = [column + (note(ways[column][0]) if len(set(ways[column])) == 1 else "") for column in shown]

    def text(column: str, row: Mapping[str, Any]) -> str:
        return cell(row.get(column)) + (note(row.get(f"{PREFIX}{column}")) if len(set(ways[column])) > 1 else "")

    table = text_table(heads, [[text(column, row) for column in shown] for row in rows], keys=2)
    notes = [f"[{number}] {line}" for number, line in enumerate(lines, start=1)]
    notes += [UNKNOWN_STEP] if any(item.step is None for item in entries) else []
    if sys.stdout.isatty():
        notes = [wrapped(line, shutil.get_terminal_size().columns) for line in notes]
    return "\n".join([table, *notes])


def write(entries: Sequence[Entry], folder: Path) -> None:
    """Write ``leaderboard.csv`` and ``leaderboard.json`` into a folder.

    Raises:
        UserError: if they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{FILE}.json", [asdict(item) for item in entries])
        write_csv(folder / f"{FILE}.csv", *rows_of(entries))
    except OSError as error:
        raise UserError(f"--out = {str(folder)!r}: {reason_of(error)}; choose another folder") from None
