"""``python -m agent.sync FOLDER``: upload what W&B lacks of runs that were recorded while it was unreachable.

`wandb sync` uploads a run that W&B has never seen, but repeats rows of a run that W&B has in part. This command
compares with W&B first, and uploads from the run's folder: history, images, checkpoints.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from agent.command import fail, run_and_leave
from agent.config import build_config
from agent.tracking.api import api_errors
from agent.tracking.arrival import send_lost_pictures
from agent.tracking.environment import has_key, load_environment
from agent.tracking.repair import staged_uploads, unsent_checkpoints
from agent.tracking.run import start_wandb
from agent.tracking.tracker import WandbTracker
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError
from diffusion_core.config.plugins import add_plugins_flag
from diffusion_core.messages import Parser
from diffusion_core.run_folder import (
    HISTORY_FILE,
    RUN_FILE,
    UNSENT,
    RunLocked,
    environment_of,
    locked,
    mark_synced,
    note_unsent,
    read_run_file,
    run_folders,
)
from diffusion_core.runs.resending import log_folder, log_lineage, recorded_config
from diffusion_core.runs.unwritten import unwritten


class Unsent(Exception):
    """Something did not arrive on W&B; the message names it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, 1 if something did not arrive, 2 if there is nothing to upload."""
    parser = Parser("python -m agent.sync", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a run, a sweep, a lottery, or several")
    # A trial whose client has broken calls this, with the exit status that W&B is to be told.
    parser.add_argument("--ended", type=int, metavar="STATUS", help=argparse.SUPPRESS)
    parser.add_argument("--preempted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--locked", action="store_true", help=argparse.SUPPRESS)  # By the trial that calls.
    add_plugins_flag(parser)
    arguments = parser.parse_args(argv)
    load_environment()
    folders: dict[Path, None] = {}
    for root in arguments.folders:
        # A run that was killed early has no history, and is handed back nevertheless.
        if not (found := [root] if arguments.preempted else run_folders(root)):
            return fail(f"FOLDER = {str(root)!r}: no run here; expected {RUN_FILE} and {HISTORY_FILE}")
        folders |= dict.fromkeys(found)
    status = 0
    for number, folder in enumerate(folders, start=1):
        lock = locked(folder) if folder.is_dir() and not arguments.locked else nullcontext()
        try:
            with lock, environment_of(folder):
                print(f"[{number}/{len(folders)}] {sync(folder, arguments.ended, preempted=arguments.preempted)}")
        except (ConfigError, CheckpointError, OSError) as error:
            if arguments.preempted and isinstance(error, RunLocked):  # Its sweep has given it to another agent.
                print(f"{folder}: goes on elsewhere ({error})")
            else:
                status = fail(unwritten(error, folder) if isinstance(error, OSError) else str(error))
        except Unsent as error:
            print(f"error: {str(folder)!r}: did not arrive: {error}; try again", file=sys.stderr)
            status = 1
    return status


def sync(folder: Path, ended: int | None = None, *, preempted: bool = False) -> str:
    """Upload what W&B lacks of the run in a folder. Return what was done, in words.

    Args:
        folder: the run's folder.
        ended: exit status that W&B is told; None: 0 if the run has a result, else 1.
        preempted: whether the run is to be resumed elsewhere.

    Raises:
        ConfigError: if W&B does not answer, or the folder holds no readable run.
        Unsent: if something did not arrive in time.
    """
    if not has_key():
        raise ConfigError("WANDB_API_KEY = None: uploads need it; set it (see .env.example) or run `wandb login`")
    run_file = read_run_file(folder)
    if preempted and not run_file:  # An agent's trial was killed before it had begun.
        run = start_wandb(os.environ["WANDB_RUN_ID"], folder, {}, "online", or_offline=False)
        run.mark_preempting()
        WandbTracker(run, first_step=run.starting_step, keep=sys.maxsize).close(1 if ended is None else ended)
        return f"{run.id}: handed back before it had begun"
    config = recorded_config(folder, build_config)
    run = start_wandb(run_file["id"], folder, config, "online", or_offline=False)
    if preempted:
        run.mark_preempting()
    tracker = WandbTracker(run, first_step=run.starting_step, keep=sys.maxsize)
    with api_errors(f"FOLDER = {str(folder)!r}"):
        send_lost_pictures(run)
        unsent = unsent_checkpoints(run, folder)
    is_finished = log_folder(tracker, folder, run.id, unsent, config.get("checkpoint.ttl_days"))
    log_lineage(tracker, folder, run_file[UNSENT], staged_uploads(run))
    left = tracker.close(int(not is_finished) if ended is None else ended)
    note_unsent(folder, left)
    if left:
        raise Unsent(", ".join(left))
    mark_synced(folder)
    return f"{folder}: complete on W&B ({run.entity}/{run.project}/{run.id})"


if __name__ == "__main__":
    run_and_leave(main)
