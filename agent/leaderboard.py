"""``python -m agent.leaderboard``: show a checkpoint of each finished run in one table, with its costs and figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from agent.command import fail, run_and_leave
from agent.tracking import project
from diffusion_core.choice import add_which_flag
from diffusion_core.config import ConfigError
from diffusion_core.config.metrics import goal_of
from diffusion_core.config.plugins import add_plugins_flag
from diffusion_core.evaluation.leaderboard import FILE, Entry, from_folders, from_models, ordered, rows_of, show, write
from diffusion_core.messages import Parser, UserError, nonempty, out_folder


def from_project(name: str, which: str) -> list[Entry]:
    """Return a checkpoint of each finished run of a W&B project, ``PROJECT`` or ``ENTITY/PROJECT``.

    Raises:
        ConfigError: if W&B does not answer, or has no such project.
        CheckpointError: if ``which`` is neither ``best``, ``newest`` nor a step.
    """
    found = project.finished_runs(name, which)
    return [row for run_id, summary, models in found for row in from_models(run_id, summary, models, which)]


def upload(name: str, entries: Sequence[Entry]) -> None:
    """Log the leaderboard as a table to a new run of the project."""
    columns, rows = rows_of(entries)
    project.log_table(name, FILE, columns, [[row.get(column) for column in columns] for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 2 if there is nothing to show."""
    parser = Parser("python -m agent.leaderboard", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="*", help="folders of runs (default: runs)")
    parser.add_argument("--project", type=nonempty, metavar="[ENTITY/]PROJECT", help="runs of a W&B project instead")
    parser.add_argument("--upload", action="store_true", help="with --project: log the table there")
    parser.add_argument("--by", metavar="FIGURE", help="sort by this figure, best first, such as eval/fid50k_train")
    add_which_flag(parser, "each run")
    parser.add_argument("--out", type=out_folder, metavar="DIR", help=f"write {FILE}.csv and {FILE}.json there")
    add_plugins_flag(parser)
    arguments = parser.parse_args(argv)
    if arguments.by and goal_of(arguments.by) is None:
        parser.error(f"--by = {arguments.by!r}: expected a figure with a goal, lower or higher")
    if arguments.upload and not arguments.project:
        parser.error("--upload: expected --project, the project to log to")
    try:
        folders = arguments.folder or [Path("runs")]
        which, of_project = arguments.which, arguments.project
        found = from_project(of_project, which) if of_project else list(from_folders(folders, which))
        if not found:
            place = f"--project = {of_project!r}" if of_project else f"FOLDER = {', '.join(map(str, folders))!r}"
            raise ConfigError(f"{place}: no finished run to show; name folders of runs, or another --project")
        entries = ordered(found, arguments.by)
        print(f"checkpoint: {which} of each run", file=sys.stderr)
        print(show(entries))
        if arguments.out:
            write(entries, arguments.out)
        if arguments.upload:
            upload(arguments.project, entries)
    except UserError as error:
        return fail(str(error))
    return 0


if __name__ == "__main__":
    run_and_leave(main)
