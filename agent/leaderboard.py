"""``python -m agent.leaderboard``: show the finished runs of a project in one table, with their costs and figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from agent.command import fail
from agent.tracking import project
from diffusion_core.config import ConfigError
from diffusion_core.config.metrics import goal_of
from diffusion_core.evaluation.leaderboard import Entry, entry, from_folders, ordered, rows_of, show
from diffusion_core.evaluation.protocol import PREFIX
from diffusion_core.files import write_csv, write_json
from diffusion_core.messages import Parser

FILE = "leaderboard"


def from_project(name: str) -> list[Entry]:
    """Return the finished runs of a W&B project, ``PROJECT`` or ``ENTITY/PROJECT``.

    Raises:
        ConfigError: if W&B does not answer, or has no such project.
    """
    entries = []
    for run_id, summary in project.finished_runs(name):
        protocols = {key.removeprefix(PREFIX): str(line) for key, line in summary.items() if key.startswith(PREFIX)}
        if any(column.startswith("model/") for column in summary):
            entries.append(entry(run_id, summary, protocols))
    return entries


def upload(name: str, entries: Sequence[Entry]) -> None:
    """Log the leaderboard as a table to a new run of the project."""
    columns, rows = rows_of(entries)
    project.log_table(name, FILE, columns, [[row.get(column) for column in columns] for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 2 if there is nothing to show."""
    parser = Parser("python -m agent.leaderboard", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="*", help="folders of runs (default: runs)")
    parser.add_argument("--project", metavar="[ENTITY/]PROJECT", help="show the runs of a W&B project instead")
    parser.add_argument("--upload", action="store_true", help="with --project: log the table there")
    parser.add_argument("--by", metavar="FIGURE", help="sort by this figure, best first, such as eval/fid50k_train")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"write {FILE}.csv and {FILE}.json into this folder")
    arguments = parser.parse_args(argv)
    if arguments.by and goal_of(arguments.by) is None:
        parser.error(f"--by = {arguments.by!r}: expected a figure with a goal, lower or higher")
    if arguments.upload and not arguments.project:
        parser.error("--upload: expected --project, the project to log to")
    try:
        folders = arguments.folder or [Path("runs")]
        found = from_project(arguments.project) if arguments.project else list(from_folders(folders))
        if not found:
            raise ConfigError("no finished run to show; expected folders of runs, or --project")
        entries = ordered(found, arguments.by)
        print(show(entries))
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_json(arguments.out / f"{FILE}.json", [asdict(item) for item in entries])
            write_csv(arguments.out / f"{FILE}.csv", *rows_of(entries))
        if arguments.upload:
            upload(arguments.project, entries)
    except (ConfigError, OSError) as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
