"""Run a lottery: rounds of training, pruning and rewinding. Each round is a run of its own.

A round whose result is present is skipped; a stopped one resumes from its checkpoint. To extend a lottery or to add a
control, run it again with another prune.rounds or prune.control. In an empty folder, the finished rounds are restored
from W&B (agent/tracking/rounds.py). The layout of the folder is described in pruning/lottery/rounds.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from agent.config import TrialConfig
from agent.tracking.repair import close_run
from agent.tracking.rounds import OpenTracker
from agent.trial import run_trial
from diffusion_core.checkpoint import list_checkpoints, newest_checkpoint, read_checkpoint
from diffusion_core.config import flatten
from diffusion_core.data.datasets import Dataset
from diffusion_core.distributed import make_accelerator
from diffusion_core.files import write_json_lines
from diffusion_core.model.unet import build_network
from diffusion_core.run_folder import CHECKPOINTS, HISTORY_FILE, RESULT_FILE, write_run_files
from diffusion_core.runs.result import TrialResult, read_result, write_result
from diffusion_core.sampling.lows import held_out
from diffusion_core.tracking import STATE, STEP, NullTracker, Tracker
from diffusion_core.training.checkpoints import SaveCheckpoints
from diffusion_core.training.resume import check_same_run, drawing_as, find_checkpoint, with_labels_of
from diffusion_core.training.stopping import Stopped, StopRequest
from diffusion_core.training.trainer import Callback, TrainState
from pruning.consistency import keep_dense_images
from pruning.lottery.report import write_summary
from pruning.lottery.rounds import REWIND, Round, check_rounds, early_checkpoint, rounds_of, start_round
from pruning.lottery.tickets import remaining
from pruning.masks.mask import empty_layers, held_masks
from pruning.training import warn_of_empty_layers

if TYPE_CHECKING:
    from agent.tracking.rounds import UploadedRounds


@dataclass(frozen=True)
class Lottery:
    """A lottery in a folder.

    Attributes:
        config: every knob. ``prune.method`` is lottery.
        dataset: the images.
        folder: the lottery's folder.
        run_id: the lottery's run id. The rounds are ``RUN_ID-00`` and so on.
        accelerator: processes and devices.
        open_tracker: makes the tracker of each round.
        stop: checked after every step.
        uploaded: the lottery's rounds on W&B; None: use the folder only.
    """

    config: TrialConfig
    dataset: Dataset
    folder: Path
    run_id: str
    accelerator: Accelerator
    open_tracker: OpenTracker
    stop: StopRequest | None
    uploaded: UploadedRounds | None

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which alone writes, prints and uploads."""
        return self.accelerator.is_main_process

    def run_id_of(self, this: Round) -> str:
        """Return the run id of a round."""
        return f"{self.run_id}-{this.name}"

    def config_of(self, this: Round) -> TrialConfig:
        """Return the configuration of a round's own run."""
        log = self.config.log.model_copy(update={"dir": str(this.folder(self.folder))})
        return self.config.model_copy(update={"prune": this.prune_config(self.config.prune), "log": log})

    def recall(self, rounds: Sequence[Round]) -> None:
        """Restore history and result of finished rounds from W&B if their folders are missing."""
        for this in rounds:
            folder = this.folder(self.folder)
            if self.uploaded is None or list_checkpoints(folder / CHECKPOINTS) or (folder / RESULT_FILE).is_file():
                continue
            if not self.uploaded.recall(self.run_id_of(this), self.config_of(this), folder):
                return

    def fetch(self, rounds: Sequence[Round]) -> None:
        """Download the missing checkpoints of finished rounds."""
        for this in rounds:
            if self.uploaded is not None:
                self.uploaded.fetch(self.run_id_of(this), this.folder(self.folder) / CHECKPOINTS, is_over=True)

    def finished(self, this: Round) -> TrialResult | None:
        """Return the result of a round if it was trained to the end.

        Raises:
            ConfigError: if the folder holds a round of another configuration.
        """
        folder, config = this.folder(self.folder), self.config_of(this)
        stored = read_result(folder)
        if stored is None:
            return None
        result, trained_with = stored
        checkpoint = find_checkpoint(config, folder / CHECKPOINTS)
        if checkpoint is None:  # It is on W&B.
            check_same_run(config, trained_with, folder)
        step = checkpoint.step if checkpoint else result.step
        return result if step == config.train.steps else None

    def run(self, this: Round) -> TrialResult:
        """Train a round to the end, in a run of its own."""
        config, folder, run_id = self.config_of(this), this.folder(self.folder), self.run_id_of(this)
        tracker = self.open_tracker(run_id, folder, config) if self.is_main else NullTracker()
        status = 1
        try:
            if self.is_main:
                self._fetch_inputs(this)
            self.accelerator.wait_for_everyone()
            self._record_inputs(this, tracker)
            result = run_trial(
                config,
                tracker,
                dataset=self._dataset_of(this),
                folder=folder,
                run_id=run_id,
                stop=self.stop,
                accelerator=self.accelerator,
                start=lambda: self._start(this, config, tracker),
                callbacks=[self._keep_for_rewinding(config, tracker)] if self.is_main and not this.number else [],
            )
            status = 0
        except Stopped as stopped:
            status = stopped.signal_code
            raise
        finally:
            close_run(tracker, folder, status, preempted=status > 128)
        return result

    def _dataset_of(self, this: Round) -> Dataset:
        """Return the images with the labels of the round before, whose masks and weights a round takes."""
        before = newest_checkpoint(this.before.folder(self.folder) / CHECKPOINTS) if this.number else None
        return self.dataset if before is None else with_labels_of(before, self.config.data, self.dataset)

    def _start(self, this: Round, config: TrialConfig, tracker: Tracker) -> TrainState:
        """Return the training state that a round starts from."""
        device = self.accelerator.device
        state = start_round(this, self.folder, config, config.prune, self.dataset.num_classes, device)
        if self.is_main and this.number == 0:
            self._keep_for_rewinding(config, tracker)(state, {})
        elif self.is_main:
            if this.number == 1:
                dense = read_checkpoint(this.before.folder(self.folder) / CHECKPOINTS).network().to(device)
                keep_dense_images(state, dense, config, held_out(self.dataset, config.upsample))
            warn_of_empty_layers(empty_layers(held_masks(state) or {}), "lottery")
        return state

    def _keep_for_rewinding(self, config: TrialConfig, tracker: Tracker) -> Callback:
        """Return a callback that writes the checkpoint which later rounds rewind to."""
        run_id = f"{self.run_id}-{REWIND}"
        saver = SaveCheckpoints(config, self.dataset, tracker, self.folder / REWIND, run_id, resumed=None)

        def keep(state: TrainState, _row: dict[str, Any]) -> None:
            if state.step == self.config.prune.rewind_step:
                saver.save(state)

        return keep

    def _fetch_inputs(self, this: Round) -> None:
        """Download the checkpoints that a round starts from, unless it has begun or they are on this disk."""
        if self.uploaded and this.number and not list_checkpoints(this.folder(self.folder) / CHECKPOINTS):
            self.fetch([this.before])
            if this.rewinds:
                self.uploaded.fetch(f"{self.run_id}-{REWIND}", self.folder / REWIND, is_over=False)

    def _record_inputs(self, this: Round, tracker: Tracker) -> None:
        """Record the artifacts that a round starts from, if they were uploaded."""
        if this.number and self.config.checkpoint.upload:
            tracker.use(f"{STATE}-{self.run_id_of(this.before)}:latest", STATE)
            if this.rewinds and tracker.live:  # Of a run that is synced later, W&B never gets this checkpoint.
                tracker.use(f"{STATE}-{self.run_id}-{REWIND}:latest", STATE)


def run_chain(
    config: TrialConfig,
    tracker: Tracker,
    *,
    dataset: Dataset,
    folder: Path,
    run_id: str,
    stop: StopRequest | None = None,
    accelerator: Accelerator | None = None,
    open_tracker: OpenTracker = lambda *_: NullTracker(),
    uploaded: UploadedRounds | None = None,
) -> TrialResult:
    """Run all rounds of a lottery as one trial. Resume from the folder, or from uploaded rounds.

    The lottery's own run has one row per round (``lottery/*``, at the round's number). Its last row also has the last
    round's figures by their usual names, so that sweeps can rank lotteries. Arguments, errors and result are those of
    :func:`agent.trial.run_trial`. The result's figures and best checkpoint are the last round's.

    Args:
        open_tracker: makes the tracker of each round's run.
        uploaded: in the first process, the lottery's rounds on W&B.
    """
    started = time.perf_counter()
    accelerator = accelerator or make_accelerator(config.train)
    is_main = accelerator.is_main_process
    lottery = Lottery(config, dataset, folder, run_id, accelerator, open_tracker, stop, uploaded)
    check_rounds(config.prune, build_network(config, dataset.num_classes))
    rounds = rounds_of(config.prune)
    lottery.recall(rounds)
    accelerator.wait_for_everyone()
    if (first := read_result(rounds[0].folder(folder))) is not None:
        config = drawing_as(config, first[1])
        lottery = replace(lottery, config=config)
    # Check all folders before changing any. All processes must skip the same rounds.
    (finished,) = broadcast_object_list([[lottery.finished(this) for this in rounds]])
    if finished[0] is not None and list_checkpoints(rounds[0].folder(folder) / CHECKPOINTS):
        early_checkpoint(folder, config.prune.rewind_step)
    if is_main:
        write_run_files(config, folder, run_id)
    rows: list[dict[str, Any]] = []
    for this, result in zip(rounds, finished, strict=True):
        last = this is rounds[-1]
        share = remaining(this.number, config.prune.per_round)
        if result is None and is_main:
            print(f"round {this.name} of {config.prune.rounds}: {share:.2%} of the weights", flush=True)
        trained = result or lottery.run(this)
        quality = {key: value for key, value in trained.figures.items() if key.startswith(("val/", "eval/"))}
        row = {"lottery/remaining": share} | {f"lottery/{key}": value for key, value in quality.items()}
        row |= quality if last else {}
        rows.append({STEP: this.number} | row)
        # Log the last row even if that round was finished: its process may have died before logging it.
        if is_main and (result is None or last):
            if last:
                lottery.fetch(rounds)
            tracker.log(row | (write_summary(folder) if last else {}), this.number)
    result = replace(trained, run_id=run_id, seconds=time.perf_counter() - started)
    if is_main:
        write_json_lines(folder / HISTORY_FILE, rows)
        tracker.summary({key: value for key, value in trained.figures.items() if key.startswith(("model/", "prune/"))})
        write_result(folder, result, flatten(config))
    return result
