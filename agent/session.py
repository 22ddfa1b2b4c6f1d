"""A trial with everything around it: environment, processes, data, the W&B run, and every way in which it may end."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
import threading
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from agent.command import fail
from agent.config import TrialConfig
from agent.lottery import run_chain
from agent.sync import mark_synced
from agent.tracking.artifacts import fetch_best, fetch_checkpoint
from agent.tracking.console import recorded_console
from agent.tracking.environment import find_run, is_offline, load_environment, wandb_mode
from agent.tracking.rounds import UploadedRounds, round_trackers
from agent.tracking.run import leave_sweep, may_fetch, start_wandb, wandb_tracker
from agent.tracking.stop_cause import was_asked_to_end
from agent.trial import TrialResult, make_accelerator, run_trial
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError, flatten
from diffusion_core.data.datasets import DataError, load_data
from diffusion_core.distributed import WATCH_EVERY_S, Peers, first_process_first
from diffusion_core.files import write_json
from diffusion_core.run_folder import CHECKPOINTS, RUN_FILE, SAMPLES, locked, make_folder, read_history, read_run_file
from diffusion_core.tracking import NullTracker, Tracker
from diffusion_core.training import callbacks
from diffusion_core.training.batch_size import settled
from diffusion_core.training.stopping import Stopped, StopRequest
from diffusion_core.training.trainer import TrainingDiverged

if TYPE_CHECKING:
    from agent.tracking.run import Run

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LAST_WORDS_S = 15.0
"""How long W&B is waited for when a trial is to end at once: another process has died, or a second signal came."""


def is_chain(config: TrialConfig) -> bool:
    """Whether a trial is a chain of lottery tickets rather than one training."""
    return config.prune.method == "lottery"


def run_session(config: TrialConfig) -> int:
    """Run a trial with W&B, from data to the last artifact; returns the exit status."""
    load_environment()
    try:
        mode = wandb_mode()
        accelerator = make_accelerator(config)
    except ConfigError as error:
        return fail(str(error))
    peers = Peers(accelerator)
    with StopRequest(peers.agree).listening() as stop, ExitStack() as stack:
        session = _Session(config, mode, accelerator, peers, stop, stack)
        try:
            return session.run()
        except KeyboardInterrupt:  # A second signal: whoever sent it does not want to wait for anything.
            print(f"interrupted; continue from the last checkpoint with --log.dir={session.folder}", file=sys.stderr)
            if not session.last_words(130):
                os._exit(130)  # Or W&B's client would wait on.
            return 130


class _Session:
    """What belongs to one trial, on one of its processes."""

    def __init__(
        self,
        config: TrialConfig,
        mode: str,
        accelerator: Accelerator,
        peers: Peers,
        stop: StopRequest,
        stack: ExitStack,
    ) -> None:
        self.config = config
        self.mode = mode
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.peers = peers
        self.stop = stop
        self.stack = stack
        self.folder: Path | None = None
        self.tracker: Tracker = NullTracker()
        self.wandb_run: Run | None = None
        self.uploaded: UploadedRounds | None = None
        self.preemptions = 0
        self.is_new = True
        """Whether the folder held no history of the run when the trial began."""

    def run(self) -> int:
        self.peers.watch(functools.partial(self.last_words, 1))
        together = True
        try:
            result = self._trial()
            status = told = 0
            if self.is_main:
                self._print(result)
        except Stopped as stopped:
            status, told = self._stopped(stopped)
        except Exception as error:
            together = False  # The other processes may be anywhere.
            status = told = self._failed(error)
        if together:
            self._close(told)
            self.peers.wait()  # For the first process's uploads: a launcher ends all when one has ended.
        elif self.peers.count > 1:
            self.peers.part()
            if not self.last_words(told):
                os._exit(status)  # Or W&B's client would wait on.
        else:
            self._close(told)
        self.peers.part()
        return status

    def _trial(self) -> TrialResult:
        config, accelerator = self.config, self.accelerator
        # All processes work in the first one's folder, and find the same checkpoint there.
        run_id, self.folder = broadcast_object_list([*find_run(config.log.dir)])
        config = config.model_copy(update={"log": config.log.model_copy(update={"dir": str(self.folder)})})
        with first_process_first(accelerator):  # The first process downloads, the others read.
            dataset = load_data(config.data, progress=config.log.progress and self.is_main)
        config = settled(config, accelerator, dataset, self.folder / CHECKPOINTS)
        if self.is_main:
            make_folder(self.folder)
            self.stack.enter_context(locked(self.folder))
            self.preemptions = read_run_file(self.folder).get("preemptions", 0)
            if self.mode != "disabled":
                self._start_tracking(config, run_id, self.folder)
        self.peers.wait()
        run = run_trial
        if is_chain(config):
            run = functools.partial(run_chain, open_tracker=round_trackers(run_id, self.mode), uploaded=self.uploaded)
        return run(
            config,
            self.tracker,
            dataset=dataset,
            folder=self.folder,
            run_id=run_id,
            stop=self.stop,
            accelerator=accelerator,
        )

    def _start_tracking(self, config: TrialConfig, run_id: str, folder: Path) -> None:
        sweep_id = leave_sweep() if is_chain(config) else None
        group = run_id if is_chain(config) and "WANDB_RUN_GROUP" not in os.environ else None
        run = self.wandb_run = start_wandb(
            run_id, folder, flatten(config), self.mode, group=group, sweep_id=sweep_id, on_stop=self.stop.ask
        )
        self.is_new = not read_history(folder)
        online = not is_offline(run)
        self.tracker = wandb_tracker(run, folder, config)
        self.stop.asked_to_end = functools.partial(was_asked_to_end, run)
        if online:
            self.stop.mark_preempting = self._mark_preempting
        if online and run.resumed:
            self.preemptions = max(self.preemptions, int(run.summary.get("preemptions") or 0))
        if may_fetch(run, config):
            if is_chain(config):
                self.uploaded = UploadedRounds(run)
            else:
                fetch_checkpoint(run, folder / CHECKPOINTS)
                fetch_best(run, folder / CHECKPOINTS)
        if os.environ.get("WANDB_CONSOLE") != "off" and hasattr(run, "write_logs"):
            self.stack.enter_context(recorded_console(run.write_logs))

    def _mark_preempting(self) -> None:
        # A launcher that lost one process sends the others SIGTERM too: that trial failed, and is not to be repeated.
        if self.wandb_run is not None and not self.peers.are_gone():
            with contextlib.suppress(Exception):  # A run that is over by now refuses it.
                self.wandb_run.mark_preempting()

    def _stopped(self, stopped: Stopped) -> tuple[int, int]:
        """The exit status of this process, and the one that W&B is told."""
        if stopped.ended:
            # Told so by its own server: for an agent, which gives up after a few failures, the trial went well.
            if self.is_main:
                print(f"{stopped}, as W&B asked; the run is over", file=sys.stderr)
            return 0, stopped.signal_code
        if self.is_main and self.folder is not None:
            self.preemptions += 1
            write_json(self.folder / RUN_FILE, read_run_file(self.folder) | {"preemptions": self.preemptions})
            self.tracker.summary({"preemptions": self.preemptions})
            if self.preemptions == callbacks.PREEMPTIONS:
                self.tracker.alert(callbacks.PREEMPTED, f"This trial was preempted {self.preemptions} times")
            print(f"{stopped}; continue with the same command and --log.dir={self.folder}", file=sys.stderr)
        return stopped.signal_code, stopped.signal_code

    def _failed(self, error: Exception) -> int:
        """Say what went wrong, in one line if it is known; returns the exit status."""
        if isinstance(error, ConfigError | DataError):
            return fail(str(error))
        if isinstance(error, TrainingDiverged):
            self.tracker.alert(callbacks.DIVERGED, str(error))
        if isinstance(error, CheckpointError | TrainingDiverged):
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, OSError) and error.errno in DISK_FULL:
            print(f"error: {str(error.filename or self.folder)!r}: {error.strerror}; make room, and continue with "
                  f"--log.dir={self.folder}", file=sys.stderr)  # fmt: skip
        elif self._is_for_a_lost_peer():
            print(f"error: {self.peers.loss()}", file=sys.stderr)
        else:
            traceback.print_exc()
        return 1

    def _is_for_a_lost_peer(self) -> bool:
        """Whether an error may come of a process that is gone: what breaks first is the connection to it."""
        for _ in range(4 if self.peers.count > 1 else 0):
            if self.peers.are_gone():
                return True
            time.sleep(WATCH_EVERY_S)
        return False

    def _print(self, result: TrialResult) -> None:
        shown = {key: value for key, value in result.figures.items() if key.startswith(("val/", "eval/", "prune/"))}
        print(f"finished {result.run_id} at step {result.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in shown.items()))
        assert self.folder is not None
        pictures = self.folder if is_chain(self.config) else self.folder / SAMPLES
        print(f"best checkpoint: {result.best_checkpoint}; pictures: {pictures}")

    def _close(self, told: int) -> None:
        """Send what is left to W&B, for a bounded time, and say what to do about the rest."""
        try:
            self.tracker.close(told)
        except TimeoutError as left:
            print(f"W&B: this has not arrived yet: {left}; to send it: python -m agent.sync {self.folder}",
                  file=sys.stderr)  # fmt: skip
        else:
            if self.wandb_run is None or self.folder is None:
                return
            if self.tracker.live:
                mark_synced(self.folder)
            elif self.is_new:
                print(f"to put this run on W&B: wandb sync {self.wandb_run.settings.sync_dir}", file=sys.stderr)
            else:
                print(f"to put this run on W&B: python -m agent.sync {self.folder}", file=sys.stderr)

    def last_words(self, told: int) -> bool:
        """Tell W&B how the trial ended, for as long as there is time; returns whether that was enough."""
        closing = threading.Thread(target=self._close, args=(told,), daemon=True)
        closing.start()
        closing.join(LAST_WORDS_S)
        return not closing.is_alive()
