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
from diffusion_core.messages import Parser
from diffusion_core.run_folder import locked, run_folders
from diffusion_core.training.leftovers import Leftover, on_disk


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 2 if the folder or project does not exist."""
    parser = Parser("python -m agent.clean", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="folder of runs or of one run (runs)")
    parser.add_argument("--project", metavar="ENTITY/PROJECT", help="search a W&B project instead")
    parser.add_argument("--yes", action="store_true", help="delete them")
    arguments = parser.parse_args(argv)
    load_environment()
    try:
        if arguments.project is not None:
            versions = versions_without_alias(arguments.project)
            _report([Leftover(version.name, version.size, version.delete) for version in versions], arguments.yes)
            return 0
        folder = arguments.folder or Path("runs")
        if not folder.is_dir():
            return fail(f"FOLDER = {str(folder)!r}: no such folder; name a folder of runs")
        for run_folder in run_folders(folder):
            try:
                with locked(run_folder):  # A process that trains the run needs its checkpoints.
                    _report(list(on_disk(run_folder)), arguments.yes)
            except ConfigError as error:
                print(f"skipped: {error}", file=sys.stderr)
    except CheckpointError as error:
        return fail(str(error))
    return 0


def _report(found: Sequence[Leftover], remove: bool) -> None:
    for leftover in found:
        print(f"{leftover.size / 1e6:10,.1f} MB  {leftover.name}{'  removed' if remove else ''}")
        if remove:
            leftover.remove()


if __name__ == "__main__":
    run_and_leave(main)
