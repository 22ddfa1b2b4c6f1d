"""A trial with everything around it: environment, processes, data, the W&B run, and every way in which it may end."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from accelerate.utils import broadcast_object_list

from agent.config import TrialConfig
from agent.lottery import OpenTracker, run_chain
from agent.preemption import Preempted, StopRequest
from agent.refusal import fail
from agent.run_folder import SAMPLES, find_run, make_folder
from agent.settings import leave_sweep, load_environment, start_wandb, wandb_mode
from agent.trial import make_accelerator, run_trial
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config_io import ConfigError, flatten
from diffusion_core.data import DataError, load_data
from diffusion_core.tracking import NullTracker, Tracker, WandbTracker
from diffusion_core.trainer import TrainingDiverged


def is_chain(config: TrialConfig) -> bool:
    """Whether a trial is a chain of lottery tickets rather than one training."""
    return config.prune.method == "lottery"


def round_trackers(chain_id: str, mode: str) -> OpenTracker:
    """What opens the W&B run of each round of a chain: all of them in one group, beside the chain's own run."""

    def open_tracker(run_id: str, folder: Path, config: TrialConfig) -> Tracker:
        if mode == "disabled":
            return NullTracker()
        return WandbTracker(start_wandb(run_id, folder, flatten(config), mode, group=chain_id, beside=True))

    return open_tracker


def run_session(config: TrialConfig) -> int:
    """Run a trial with W&B, from data to the last artifact; returns the exit status."""
    load_environment()
    tracker: Tracker = NullTracker()
    stop = StopRequest()
    folder = None
    try:
        mode = wandb_mode()
        accelerator = make_accelerator(config)
        # All processes work in the first one's folder, and find the same checkpoint there.
        run_id, folder = broadcast_object_list([*find_run(config.log.dir)])
        config = config.model_copy(update={"log": config.log.model_copy(update={"dir": str(folder)})})
        with accelerator.main_process_first():  # The first process downloads, the others read.
            dataset = load_data(config.data, progress=config.log.progress and accelerator.is_main_process)
        if accelerator.is_main_process:
            make_folder(folder)
        if accelerator.is_main_process and mode != "disabled":
            sweep_id = leave_sweep() if is_chain(config) else None
            group = run_id if is_chain(config) and "WANDB_RUN_GROUP" not in os.environ else None
            wandb_run = start_wandb(run_id, folder, flatten(config), mode, group=group, sweep_id=sweep_id)
            tracker = WandbTracker(wandb_run)
            stop.on_request = wandb_run.mark_preempting
        run = partial(run_chain, open_tracker=round_trackers(run_id, mode)) if is_chain(config) else run_trial
        with stop.listening():
            result = run(
                config, tracker, dataset=dataset, folder=folder, run_id=run_id, stop=stop, accelerator=accelerator
            )
    except (ConfigError, DataError) as error:
        tracker.close(2)
        return fail(str(error))
    except (CheckpointError, TrainingDiverged) as error:
        tracker.close(1)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Preempted as preempted:
        tracker.close(preempted.exit_code)
        print(f"{preempted}; continue with the same command and --log.dir={folder}", file=sys.stderr)
        return preempted.exit_code
    except KeyboardInterrupt:  # The second signal: whoever sent it does not want to wait for a checkpoint.
        tracker.close(130)
        print(f"interrupted; continue from the last checkpoint with --log.dir={folder}", file=sys.stderr)
        return 130
    except BaseException:
        tracker.close(1)
        raise
    if accelerator.is_main_process:
        shown = {key: value for key, value in result.figures.items() if key.startswith(("val/", "eval/", "prune/"))}
        print(f"finished {run_id} at step {result.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in shown.items()))
        print(
            f"best checkpoint: {result.best_checkpoint}; pictures: {folder if is_chain(config) else folder / SAMPLES}"
        )
    tracker.close(0)
    return 0
