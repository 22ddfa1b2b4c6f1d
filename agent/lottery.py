"""A chain of lottery tickets: round after round of training, pruning and rewinding. Each round is a run of its own.

FOLDER/                      the chain's own folder: run.json, config.yaml, history.jsonl, result.json
    rewind/step-*/           the dense network at prune.rewind_step
    rounds/00/               the folder of the dense run (see diffusion_core/run_folder.py)
    rounds/01/ ...           of the run of each round's ticket
    rounds/08-reinit/        of a control's, in place of the ticket of the last round
    summary.json, *.md, *.png  (pruning/lottery/report.py)

A round whose output is there is skipped; one that was stopped goes on from its checkpoint. So a chain can be made
longer, or be given a control, by running it again with another prune.rounds or prune.control. In an empty folder it
goes on from what W&B has of it (agent/tracking/rounds.py).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from agent.config import TrialConfig
from agent.tracking.rounds import OpenTracker
from agent.trial import TrialResult, make_accelerator, run_trial, warn_of_empty_layers, write_run_files
from diffusion_core.checkpoint import Checkpoint, list_checkpoints, read_checkpoint, step_folder
from diffusion_core.config import ConfigError, flatten
from diffusion_core.data.datasets import Dataset
from diffusion_core.files import write_json, write_json_lines
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import build_network
from diffusion_core.run_folder import CHECKPOINTS, HISTORY_FILE, RESULT_FILE
from diffusion_core.tracking import STEP, NullTracker, Tracker
from diffusion_core.training.checkpoints import SaveCheckpoints
from diffusion_core.training.resume import check_same_run, find_checkpoint
from diffusion_core.training.stopping import Stopped, StopRequest
from diffusion_core.training.trainer import Callback, TrainState
from pruning.config import PruneConfig
from pruning.consistency import inherit_dense_images, keep_dense_images
from pruning.lottery.report import ROUNDS, write_summary
from pruning.lottery.tickets import most_rounds, random_mask, record, reinitialised, remaining, rewound, trained_ticket
from pruning.masks.mask import empty_layers

if TYPE_CHECKING:
    from agent.tracking.rounds import UploadedRounds

REWIND = "rewind"


def no_tracker(_run_id: str, _folder: Path, _config: TrialConfig) -> Tracker:
    """Open a tracker that records nothing: the default of ``run_chain``."""
    return NullTracker()


@dataclass(frozen=True)
class Stage:
    """One round of a chain, or the control in its place."""

    round_number: int
    control: str = "none"

    @property
    def name(self) -> str:
        """Of its folder, and the end of its run's id."""
        return f"{self.round_number:02d}" + ("" if self.control == "none" else f"-{self.control.replace('_', '-')}")


def stages_of(prune: PruneConfig) -> list[Stage]:
    """What a chain trains, in order: the dense network, a ticket a round, and at last the control if there is one."""
    return [*(Stage(number) for number in range(prune.rounds)), Stage(prune.rounds, prune.control)]


class Chain:
    """A chain of tickets in a folder.

    Args:
        config: every knob; ``prune.method`` is lottery.
        dataset: the images.
        folder: where it all goes.
        run_id: the chain's; rounds are ``RUN_ID-00`` and so on.
        accelerator: processes and devices.
        open_tracker: makes the tracker of each round.
        stop: asked after every step whether to stop.
        uploaded: the chain's rounds on W&B, if it goes on from there; None: what is in the folder is all.
    """

    def __init__(
        self,
        config: TrialConfig,
        dataset: Dataset,
        folder: Path,
        run_id: str,
        accelerator: Accelerator,
        open_tracker: OpenTracker,
        stop: StopRequest | None,
        uploaded: UploadedRounds | None = None,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.folder = folder
        self.run_id = run_id
        self.accelerator = accelerator
        self.open_tracker = open_tracker
        self.stop = stop
        self.uploaded = uploaded

    def check(self) -> None:
        """Refuse a chain that would prune everything, before anything is written.

        Raises:
            ConfigError: if the last round leaves no weight.
        """
        prune = self.config.prune
        network = build_network(self.config, self.dataset.num_classes)
        count = sum(weight.numel() for weight in maskable(network).values())
        most = most_rounds(count, prune.per_round)
        if prune.rounds > most:
            raise ConfigError(
                f"prune.rounds = {prune.rounds}: with prune.per_round = {prune.per_round}, none of {count:,} weights "
                f"would be left; expected at most {most}"
            )

    def stage_folder(self, stage: Stage) -> Path:
        """Folder of the run of one stage."""
        return self.folder / ROUNDS / stage.name

    def stage_run_id(self, stage: Stage) -> str:
        """W&B id of the run of one stage."""
        return f"{self.run_id}-{stage.name}"

    def stage_config(self, stage: Stage) -> TrialConfig:
        """The configuration of a round's own run: it says how that ticket came about, and nothing of later rounds."""
        prune = PruneConfig()
        if stage.round_number:
            prune = self.config.prune.model_copy(update={"rounds": stage.round_number, "control": stage.control})
        log = self.config.log.model_copy(update={"dir": str(self.stage_folder(stage))})
        return self.config.model_copy(update={"prune": prune, "log": log})

    def recall(self, stages: Sequence[Stage]) -> None:
        """Write down what W&B knows of the rounds that were run to their end, where their folders are missing."""
        for stage in stages:
            folder = self.stage_folder(stage)
            if self.uploaded is None or list_checkpoints(folder / CHECKPOINTS) or (folder / RESULT_FILE).is_file():
                continue
            if not self.uploaded.recall(self.stage_run_id(stage), self.stage_config(stage), folder):
                return

    def fetch(self, stages: Sequence[Stage]) -> None:
        """Download the checkpoints of rounds that are over, where they are missing."""
        for stage in stages:
            if self.uploaded is not None:
                self.uploaded.fetch(self.stage_run_id(stage), self.stage_folder(stage) / CHECKPOINTS, is_over=True)

    def finished(self, stage: Stage) -> TrialResult | None:
        """What a round came to, if it was run to its end, by the same configuration.

        Raises:
            ConfigError: if the folder holds another chain.
        """
        folder = self.stage_folder(stage)
        found = None
        if (folder / RESULT_FILE).is_file():
            stored = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
            checkpoint = find_checkpoint(self.stage_config(stage), folder / CHECKPOINTS)
            if checkpoint is None:  # It is on W&B.
                check_same_run(self.stage_config(stage), stored["config"], folder)
            if (checkpoint.step if checkpoint else stored["step"]) == self.config.train.steps:
                best = folder / CHECKPOINTS / Path(stored["best_checkpoint"]).name
                found = TrialResult(stored["run_id"], stored["step"], stored["figures"], best, stored["seconds"])
        return found

    def run(self, stage: Stage) -> TrialResult:
        """Train a round's ticket, or the dense network, to the end."""
        config, folder, run_id = self.stage_config(stage), self.stage_folder(stage), self.stage_run_id(stage)
        is_main = self.accelerator.is_main_process
        tracker = self.open_tracker(run_id, folder, config) if is_main else NullTracker()
        try:
            if is_main:
                self._fetch_inputs(stage)
            self.accelerator.wait_for_everyone()
            self._use_inputs(stage, tracker)
            result = run_trial(
                config,
                tracker,
                dataset=self.dataset,
                folder=folder,
                run_id=run_id,
                stop=self.stop,
                accelerator=self.accelerator,
                start=lambda: self._start(stage, config, tracker),
                callbacks=[self._keep_for_rewinding(config, tracker)] if is_main and not stage.round_number else [],
            )
        except Stopped as stopped:
            _close(tracker, stopped.signal_code, folder)
            raise
        except BaseException:
            _close(tracker, 1, folder)
            raise
        _close(tracker, 0, folder)
        return result

    def _start(self, stage: Stage, config: TrialConfig, tracker: Tracker) -> TrainState:
        """The training state that a round begins with."""
        device = self.accelerator.device
        if not stage.round_number:
            state = TrainState.start(build_network(config, self.dataset.num_classes).to(device), config)
            if self.accelerator.is_main_process:
                self._keep_for_rewinding(config, tracker)(state, {})
            return state
        before = read_checkpoint(self.stage_folder(Stage(stage.round_number - 1)) / CHECKPOINTS)
        masks = trained_ticket(before, stage.round_number, config.prune)
        if stage.control == "random_mask":
            masks = random_mask(masks, config.seed)
        if stage.control == "reinit":
            state = reinitialised(masks, self.dataset.num_classes, config, device)
        else:
            state = rewound(self.early(), masks, config, device)
        record(state, config.prune, config.seed)
        if stage.round_number > 1:
            inherit_dense_images(state, before)
        if self.accelerator.is_main_process:
            if stage.round_number == 1:
                keep_dense_images(state, before.network().to(device), config)
            warn_of_empty_layers(empty_layers(masks))
        return state

    def _keep_for_rewinding(self, config: TrialConfig, tracker: Tracker) -> Callback:
        """A callback that writes the checkpoint to which later rounds go back."""
        saver = SaveCheckpoints(
            config, self.dataset, tracker, self.folder / REWIND, f"{self.run_id}-{REWIND}", resumed=None
        )
        step = self.config.prune.rewind_step

        def keep(state: TrainState, _row: dict[str, Any]) -> None:
            if state.step == step:
                saver.save(state)

        return keep

    def early(self) -> Checkpoint:
        """The checkpoint to which rounds go back.

        Raises:
            ConfigError: if the dense network was trained without keeping that step.
        """
        step = self.config.prune.rewind_step
        path = self.folder / REWIND / step_folder(step)
        if not path.is_dir():
            raise ConfigError(
                f"prune.rewind_step = {step}: the chain in {str(self.folder)!r} did not keep that step; set it back, "
                f"or choose another log.dir"
            )
        return read_checkpoint(path)

    def _fetch_inputs(self, stage: Stage) -> None:
        """Download what a round is made from, if it is yet to begin, and that is not here."""
        if self.uploaded and stage.round_number and not list_checkpoints(self.stage_folder(stage) / CHECKPOINTS):
            self.fetch([Stage(stage.round_number - 1)])
            if stage.control != "reinit":
                self.uploaded.fetch(f"{self.run_id}-{REWIND}", self.folder / REWIND, is_over=False)

    def _use_inputs(self, stage: Stage, tracker: Tracker) -> None:
        """Say which artifacts a round is made from, where they were uploaded."""
        if stage.round_number and self.config.checkpoint.upload:
            tracker.use(f"training-state-{self.stage_run_id(Stage(stage.round_number - 1))}:latest", "training-state")
            if stage.control != "reinit":
                tracker.use(f"training-state-{self.run_id}-{REWIND}:latest", "training-state")


def _close(tracker: Tracker, exit_code: int, folder: Path) -> None:
    """End a round's run on W&B; what has not arrived in time can be sent later."""
    try:
        tracker.close(exit_code)
    except TimeoutError as left:
        print(f"W&B: this has not arrived yet: {left}; to send it: python -m agent.sync {folder}", file=sys.stderr)


def run_chain(
    config: TrialConfig,
    tracker: Tracker,
    *,
    dataset: Dataset,
    folder: Path,
    run_id: str,
    stop: StopRequest | None = None,
    accelerator: Accelerator | None = None,
    open_tracker: OpenTracker = no_tracker,
    uploaded: UploadedRounds | None = None,
) -> TrialResult:
    """Run a chain of tickets as one trial; goes on where the folder left off, or what was uploaded from another one.

    The chain's own run has a row a round (``lottery/*``, at the round's number), and at last the figures of the last
    round by their usual names, so that a sweep ranks chains by those. Arguments, errors and result are those of
    :func:`agent.trial.run_trial`; the result's figures and best checkpoint are the last round's.

    Args:
        open_tracker: makes the tracker of each round's run.
        uploaded: in the first process, the chain's rounds on W&B.
    """
    started = time.perf_counter()
    accelerator = accelerator or make_accelerator(config)
    chain = Chain(config, dataset, folder, run_id, accelerator, open_tracker, stop, uploaded)
    chain.check()
    stages = stages_of(config.prune)
    chain.recall(stages)
    accelerator.wait_for_everyone()
    # A folder of another chain is refused before anything in it changes; all processes skip the same rounds.
    (finished,) = broadcast_object_list([[chain.finished(stage) for stage in stages]])
    if finished[0] is not None and list_checkpoints(chain.stage_folder(stages[0]) / CHECKPOINTS):
        chain.early()
    if accelerator.is_main_process:
        write_run_files(config, folder, run_id)
    rows: list[dict[str, Any]] = []
    for stage, result in zip(stages, finished, strict=True):
        last = stage is stages[-1]
        share = remaining(stage.round_number, config.prune.per_round)
        if result is None and accelerator.is_main_process:
            print(f"round {stage.name} of {config.prune.rounds}: {share:.2%} of the weights", flush=True)
        trained = result or chain.run(stage)
        quality = {key: value for key, value in trained.figures.items() if key.startswith(("val/", "eval/"))}
        row = {"lottery/remaining": share} | {f"lottery/{key}": value for key, value in quality.items()}
        rows.append({STEP: stage.round_number} | row | (quality if last else {}))
        # The last row also if that round was finished: the process that did so may not have come to log it.
        if accelerator.is_main_process and (result is None or last):
            pictures = {}
            if last:
                chain.fetch(stages)
                pictures = write_summary(folder)
            tracker.log({key: value for key, value in (rows[-1] | pictures).items() if key != STEP}, stage.round_number)
    result = replace(trained, run_id=run_id, seconds=time.perf_counter() - started)
    if accelerator.is_main_process:
        write_json_lines(folder / HISTORY_FILE, rows)
        tracker.summary({key: value for key, value in trained.figures.items() if key.startswith(("model/", "prune/"))})
        described = asdict(result) | {"best_checkpoint": str(result.best_checkpoint), "config": flatten(config)}
        write_json(folder / RESULT_FILE, described)
    return result
