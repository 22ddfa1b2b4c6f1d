"""The rounds of a chain of tickets on W&B: a run for each, and what a chain goes on from in an empty folder.

Figures of a finished round are fetched first. Its checkpoint, which may be large, is fetched when it is needed, and
only the parts that are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from agent.config import TrialConfig
from agent.tracking.artifacts import download_files, fetch_checkpoint, uploaded_versions
from agent.tracking.run import may_fetch, start_wandb, wandb_tracker
from diffusion_core.checkpoint import list_checkpoints, step_folder
from diffusion_core.config import ConfigError, flatten
from diffusion_core.files import write_json
from diffusion_core.messages import one_line
from diffusion_core.run_folder import CHECKPOINTS, HISTORY_FILE, RESULT_FILE, best_figures, read_history
from diffusion_core.tracking import NullTracker, Tracker
from diffusion_core.training.resume import check_same_run

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

COSTS = ("model/", "prune/")
"""What the names of figures begin with that a run's summary has, and its history has not."""

OpenTracker = Callable[[str, Path, TrialConfig], Tracker]
"""Run id, folder and configuration of a round to where its figures go."""


class UploadedRounds:
    """Rounds in the project of their chain.

    Args:
        run: the chain's own run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def recall(self, run_id: str, config: TrialConfig, folder: Path) -> bool:
        """Write history and result of a round that is over into its folder; returns whether there is one.

        Args:
            run_id: the round's.
            config: the round's.
            folder: the round's.

        Raises:
            ConfigError: if it is one of another configuration.
        """
        import wandb

        steps = config.train.steps
        try:
            models, states = uploaded_versions(self.run, run_id)
            if steps not in models or steps not in states:
                return False
            round_run = wandb.Api().run(f"{self.run.entity}/{self.run.project}/{run_id}")
            if round_run.state != "finished":  # Its result was not written yet; that is done by going on with it.
                return False
            check_same_run(config, dict(states[steps].metadata["config"]), folder)
            download_files(states[steps], folder, lambda name: name == HISTORY_FILE)
            summary = dict(round_run.summary)
        except ConfigError:
            raise
        except (wandb.errors.Error, ValueError, KeyError, TypeError, OSError) as error:
            print(f"W&B: nothing of round {run_id} ({one_line(error)})", file=sys.stderr)
            return False
        costs = {key: value for key, value in summary.items() if key.startswith(COSTS) and type(value) in (int, float)}
        described = {
            "run_id": run_id,
            "step": steps,
            "figures": best_figures(read_history(folder)) | costs,
            "best_checkpoint": str(folder / CHECKPOINTS / step_folder(steps)),
            "seconds": 0.0,  # Of this machine's time it took none.
            "config": flatten(config),
        }
        write_json(folder / RESULT_FILE, described)
        return True

    def fetch(self, run_id: str, checkpoints: Path, *, is_over: bool) -> None:
        """Download the newest checkpoint of a round, unless there is one here.

        Args:
            run_id: the round's, or that of the checkpoint which rounds go back to.
            checkpoints: the folder where its checkpoints are.
            is_over: whether training does not go on from it: then it comes without the optimizer's moments.
        """
        if not list_checkpoints(checkpoints):
            fetch_checkpoint(self.run, checkpoints, run_id=run_id, without=("optimizer",) if is_over else ())


def round_trackers(chain_id: str, mode: str) -> OpenTracker:
    """What opens the W&B run of each round of a chain: all of them in one group, beside the chain's own run."""

    def open_tracker(run_id: str, folder: Path, config: TrialConfig) -> Tracker:
        if mode == "disabled":
            return NullTracker()
        run = start_wandb(run_id, folder, flatten(config), mode, group=chain_id, beside=True)
        if may_fetch(run, config):
            fetch_checkpoint(run, folder / CHECKPOINTS)
        return wandb_tracker(run, folder, config)

    return open_tracker
