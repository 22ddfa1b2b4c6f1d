"""The rounds of a lottery on W&B: open a run for each, and restore finished rounds in an empty folder.

History and result of a finished round are downloaded first. Its checkpoint, which may be large, follows when a later
round needs it, without the parts that are not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from agent.config import TrialConfig
from agent.tracking.api import failures
from agent.tracking.artifacts import download_files, fetch_checkpoint, uploaded_versions
from agent.tracking.run import may_fetch, start_wandb, wandb_tracker
from diffusion_core.checkpoint import list_checkpoints, step_folder
from diffusion_core.config import ConfigError, flatten
from diffusion_core.messages import one_line
from diffusion_core.run_folder import CHECKPOINTS, HISTORY_FILE, best_figures, read_history
from diffusion_core.runs.recorded import summary_figures
from diffusion_core.runs.result import TrialResult, write_result
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import NullTracker, Tracker
from diffusion_core.training.resume import check_same_run

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

COSTS = ("model/", "prune/", "sample/")
"""Prefixes of the figures that a run has in its summary only, not in its history."""

OpenTracker = Callable[[str, Path, TrialConfig], Tracker]
"""Makes the tracker of a round from its run id, folder and configuration."""


class UploadedRounds:
    """The rounds of a lottery on W&B, in the project of the lottery's own run.

    Args:
        run: the lottery's own run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def recall(self, run_id: str, config: TrialConfig, folder: Path) -> bool:
        """Write history and result of a finished round into its folder. Return whether W&B has it.

        Args:
            run_id: the round's run id.
            config: the round's configuration.
            folder: the round's folder.

        Raises:
            ConfigError: if the round on W&B has another configuration.
        """
        import wandb

        steps = config.train.steps
        try:
            models, states = uploaded_versions(self.run, run_id)
            if steps not in models or steps not in states:
                return False
            round_run = wandb.Api().run(f"{self.run.entity}/{self.run.project}/{run_id}")
            if round_run.state != "finished":  # Its result is missing. Resuming the round writes it.
                return False
            check_same_run(config, dict(states[steps].metadata["config"]), folder)
            download_files(states[steps], folder, lambda name: name == HISTORY_FILE)
            summary = summary_figures(round_run.summary)
        except ConfigError:
            raise
        except failures() as error:
            say(f"W&B: could not restore round {run_id} ({one_line(error)})")
            return False
        costs = {key: value for key, value in summary.items() if key.startswith(COSTS)}
        figures = best_figures(read_history(folder)) | costs
        checkpoint = folder / CHECKPOINTS / step_folder(steps)
        write_result(folder, TrialResult(run_id, steps, figures, checkpoint, seconds=0.0), flatten(config))
        return True

    def fetch(self, run_id: str, checkpoints: Path, *, is_over: bool) -> None:
        """Download the newest checkpoint of a round, unless there is one on this disk.

        Args:
            run_id: the run id of the round, or of the checkpoint that rounds rewind to.
            checkpoints: folder of its checkpoints.
            is_over: whether its training is finished; if so, leave out the optimizer's moments.
        """
        if not list_checkpoints(checkpoints):
            fetch_checkpoint(self.run, checkpoints, run_id=run_id, without=("optimizer",) if is_over else ())


def round_trackers(lottery_id: str, mode: str) -> OpenTracker:
    """Return a function that opens the W&B run of a round, in one group and beside the lottery's own run."""

    def open_tracker(run_id: str, folder: Path, config: TrialConfig) -> Tracker:
        if mode == "disabled":
            return NullTracker()
        run = start_wandb(run_id, folder, flatten(config), mode, group=lottery_id, beside=True)
        if may_fetch(run, config.checkpoint):
            fetch_checkpoint(run, folder / CHECKPOINTS)
        return wandb_tracker(run, folder, config.checkpoint, mode)

    return open_tracker
