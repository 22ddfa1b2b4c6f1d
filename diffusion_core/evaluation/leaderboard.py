"""Models in one table, with their costs and figures, and how these were measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_core.config.metrics import best_first, goal_of
from diffusion_core.evaluation.protocol import PREFIX
from diffusion_core.run_folder import PROTOCOLS_FILE, RESULT_FILE
from diffusion_core.tables import cell, text_table

COSTS = {"parameters": "model/params", "MACs": "model/macs", "latency": "model/latency"}
"""Columns of costs, and the prefix of the figure in each."""

QUALITY_PREFIXES = ("val/loss", "eval/")
EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Entry:
    """A model on the leaderboard.

    Attributes:
        model: its run's id or name.
        costs: known costs by column.
        figures: figures of quality by name; each has a goal, lower or higher.
        protocols: how the figures were measured, by their names.
    """

    model: str
    costs: dict[str, float]
    figures: dict[str, float]
    protocols: dict[str, str]


def entry(model: str, figures: Mapping[str, Any], protocols: Mapping[str, str]) -> Entry:
    """Return a model's entry, given all figures of its run."""
    costs = {}
    for column, prefix in COSTS.items():
        found = [value for name, value in figures.items() if name.startswith(prefix) and isinstance(value, int | float)]
        if found:
            costs[column] = found[0]
    quality = {
        name: float(value)
        for name, value in figures.items()
        if name.startswith(QUALITY_PREFIXES) and goal_of(name) and isinstance(value, int | float)
    }
    return Entry(model, costs, quality, {name: line for name, line in protocols.items() if name in quality})


def from_folders(roots: Sequence[Path]) -> Iterator[Entry]:
    """Yield the finished runs below some folders, with what scripts/evaluate.py measured of their checkpoints."""
    for file in sorted(file for root in roots for file in root.rglob(RESULT_FILE)):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            figures: dict[str, Any] = dict(result["figures"])
            protocols: dict[str, str] = {}
            later = [file.parent / PROTOCOLS_FILE, *sorted((file.parent / "checkpoints").glob(f"*/{EVALUATION_FILE}"))]
            for other in (path for path in later if path.is_file()):
                content = json.loads(other.read_text(encoding="utf-8"))
                figures |= content.get("figures", {}) if other.name == EVALUATION_FILE else {}
                protocols |= content.get("protocols", {}) if other.name == EVALUATION_FILE else content
            yield entry(str(result["run_id"]), figures, protocols)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            print(f"{file}: skipped, it is damaged", file=sys.stderr)


def ordered(entries: Sequence[Entry], metric: str | None) -> list[Entry]:
    """Return the entries by a figure, best first; then those without it."""
    return best_first(entries, metric, lambda item: item.figures)


def rows_of(entries: Sequence[Entry]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return columns (model, costs, figures, and the protocol beside each figure that has one) and rows by column."""
    costs = [column for column in COSTS if any(column in item.costs for item in entries)]
    figures = list(dict.fromkeys(name for item in entries for name in item.figures))
    columns = ["model", *costs]
    for name in figures:
        columns += [name, *([f"{PREFIX}{name}"] if any(name in item.protocols for item in entries) else [])]
    rows = []
    for item in entries:
        protocols = {f"{PREFIX}{name}": line for name, line in item.protocols.items()}
        rows.append({"model": item.model, **item.costs, **item.figures, **protocols})
    return columns, rows


def show(entries: Sequence[Entry]) -> str:
    """Return the leaderboard as text: cells hold the numbers of protocols, and lines below spell them out."""
    columns, rows = rows_of(entries)
    lines = list(dict.fromkeys(line for item in entries for line in item.protocols.values()))

    def text(column: str, value: Any) -> str:
        return f"[{lines.index(value) + 1}]" if column.startswith(PREFIX) and value else cell(value)

    head = ["protocol" if column.startswith(PREFIX) else column for column in columns]
    table = text_table(head, [[text(column, row.get(column)) for column in columns] for row in rows])
    return "\n".join([table, *(f"[{number}] {line}" for number, line in enumerate(lines, start=1))])
