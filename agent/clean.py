"""``python -m agent.clean``: list unreferenced checkpoints and uploads; delete them with --yes.

On this machine: checkpoints that are neither the best nor among the newest `checkpoint.keep`, unfinished checkpoints,
and staged copies of uploads that have arrived. On W&B: versions of models and training states without an alias.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from agent.command import fail, run_and_leave
from agent.tracking.environment import load_environment
from agent.tracking.project import versions_without_alias
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError
from diffusion_core.messages import Parser, nonempty
from diffusion_core.run_folder import RunLocked, locked, run_folders
from diffusion_core.runs.leftovers import Leftover, on_disk
from diffusion_core.runs.unwritten import unwritten


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 2 if there is nothing of this name, or not all could be done."""
    parser = Parser("python -m agent.clean", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="folder of runs or of one run (runs)")
    parser.add_argument("--project", type=nonempty, metavar="ENTITY/PROJECT", help="search a W&B project instead")
    parser.add_argument("--yes", action="store_true", help="delete them")
    arguments = parser.parse_args(argv)
    load_environment()
    status = 0
    try:
        if arguments.project is not None:
            place = arguments.project
            left = _treat(list(versions_without_alias(place)), arguments.yes)
        else:
            place = arguments.folder or Path("runs")
            if not place.is_dir():
                return fail(f"FOLDER = {str(place)!r}: no such folder; name a folder of runs")
            left = 0
            for run_folder in run_folders(place):
                try:
                    with locked(run_folder):  # A process that trains the run needs its checkpoints.
                        left += _treat(list(on_disk(run_folder)), arguments.yes)
                except RunLocked as error:
                    print(f"skipped: {error}", file=sys.stderr)
                except (CheckpointError, ConfigError, OSError) as error:
                    status = fail(unwritten(error, run_folder) if isinstance(error, OSError) else str(error))
    except (CheckpointError, ConfigError) as error:
        return fail(str(error))
    if not left and not status:
        print(f"{place}: nothing to remove", file=sys.stderr)
    elif left and not arguments.yes:
        print(f"{left} found; --yes deletes them", file=sys.stderr)
    return status


def _treat(found: Sequence[Leftover], remove: bool) -> int:
    """Print what was found, and remove it if asked to. Return how many there are."""
    for leftover in found:
        if remove:
            leftover.remove()
        print(f"{leftover.size / 1e6:10,.1f} MB  {leftover.name}{'  removed' if remove else ''}")
    return len(found)


if __name__ == "__main__":
    run_and_leave(main)
