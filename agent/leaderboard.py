"""``python -m agent.leaderboard``: the models of a project in one table, with what they cost and how good they are."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent.command import fail
from agent.sweep.results import TrialRecord, best_first, shown, table_of
from agent.tracking import project
from diffusion_core.config import ConfigError
from diffusion_core.config.metrics import goal_of
from diffusion_core.evaluation.protocol import PREFIX
from diffusion_core.files import write_json
from diffusion_core.run_folder import PROTOCOLS_FILE, RESULT_FILE

COSTS = {"parameters": "model/params", "MACs": "model/macs", "latency": "model/latency"}
"""Columns of what a model costs, and what its figures' names begin with."""

JUDGED = ("val/loss", "eval/")
FILE = "leaderboard"
EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Entry:
    """A model on the board.

    Attributes:
        model: its run's id or name.
        costs: by column, what is known.
        figures: that are better one way, by name.
        protocols: how they were measured, by name.
    """

    model: str
    costs: dict[str, float]
    figures: dict[str, float]
    protocols: dict[str, str]


def entry(model: str, figures: Mapping[str, Any], protocols: Mapping[str, str]) -> Entry:
    """A model's entry from all figures of its run, of which some are costs and some say how good it is."""
    costs = {}
    for column, beginning in COSTS.items():
        found = [
            value for name, value in figures.items() if name.startswith(beginning) and isinstance(value, int | float)
        ]
        if found:
            costs[column] = found[0]
    judged = {
        name: float(value)
        for name, value in figures.items()
        if name.startswith(JUDGED) and goal_of(name) and isinstance(value, int | float)
    }
    return Entry(model, costs, judged, {name: line for name, line in protocols.items() if name in judged})


def from_folders(roots: Sequence[Path]) -> Iterator[Entry]:
    """The finished runs below some folders, with what scripts/evaluate.py measured of their checkpoints since."""
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
            print(f"{file}: passing over a damaged result", file=sys.stderr)


def from_project(name: str) -> list[Entry]:
    """The finished runs of a W&B project, ``PROJECT`` or ``ENTITY/PROJECT``.

    Raises:
        ConfigError: if W&B cannot be reached, or has no such project.
    """
    entries = []
    for run_id, summary in project.finished_runs(name):
        protocols = {key.removeprefix(PREFIX): str(line) for key, line in summary.items() if key.startswith(PREFIX)}
        if any(column.startswith("model/") for column in summary):
            entries.append(entry(run_id, summary, protocols))
    return entries


def ordered(entries: Sequence[Entry], metric: str | None) -> list[Entry]:
    """Best first by a figure; those without it come last."""
    records = [TrialRecord(str(i), "finished", {}, item.figures) for i, item in enumerate(entries)]
    return [entries[int(record.id)] for record in best_first(records, metric)]


def rows_of(entries: Sequence[Entry]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: model, costs, figures, and a protocol beside each figure that has one."""
    costs = [column for column in COSTS if any(column in item.costs for item in entries)]
    figures = list(dict.fromkeys(name for item in entries for name in item.figures))
    columns = ["model", *costs]
    for name in figures:
        columns += [name, *([f"{PREFIX}{name}"] if any(name in item.protocols for item in entries) else [])]
    rows = []
    for item in entries:
        cells = {"model": item.model, **item.costs, **item.figures}
        cells |= {f"{PREFIX}{name}": line for name, line in item.protocols.items()}
        rows.append([cells.get(column) for column in columns])
    return columns, rows


def show(entries: Sequence[Entry]) -> str:
    """The board as text: protocols are numbered, and spelt out below."""
    columns, rows = rows_of(entries)
    lines = list(dict.fromkeys(line for item in entries for line in item.protocols.values()))
    text = [["protocol" if column.startswith(PREFIX) else column for column in columns]]
    for row in rows:
        cells = zip(columns, row, strict=True)
        text.append([f"[{lines.index(value) + 1}]" if column.startswith(PREFIX) and value else shown(value)
                     for column, value in cells])  # fmt: skip
    return "\n".join([table_of(text), *(f"[{number}] {line}" for number, line in enumerate(lines, start=1))])


def upload(name: str, entries: Sequence[Entry]) -> None:
    """Log the board as a table, in a run of its own in the project."""
    columns, rows = rows_of(entries)
    project.log_table(name, FILE, columns, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if there is nothing to show."""
    parser = argparse.ArgumentParser("python -m agent.leaderboard", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="*", help="folders of runs (runs)")
    parser.add_argument("--project", metavar="[ENTITY/]PROJECT", help="the runs of a W&B project instead")
    parser.add_argument("--upload", action="store_true", help="with --project: log the table there")
    parser.add_argument("--by", metavar="FIGURE", help="best first by this figure, such as eval/fid50k_train")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"write {FILE}.csv and {FILE}.json into this folder")
    arguments = parser.parse_args(argv)
    if arguments.by and goal_of(arguments.by) is None:
        parser.error(f"--by = {arguments.by!r}: not a figure that is better one way")
    if arguments.upload and not arguments.project:
        parser.error("--upload: expected --project, where the table is to go")
    try:
        found = from_project(arguments.project) if arguments.project else list(
            from_folders(arguments.folder or [Path("runs")]))  # fmt: skip
        if not found:
            raise ConfigError("no finished run to show; expected folders of runs, or --project")
        entries = ordered(found, arguments.by)
        print(show(entries))
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_json(arguments.out / f"{FILE}.json", [asdict(item) for item in entries])
            columns, rows = rows_of(entries)
            with (arguments.out / f"{FILE}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *rows])
        if arguments.upload:
            upload(arguments.project, entries)
    except (ConfigError, OSError) as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
