"""Run a trial with everything around it: environment, processes, data, the W&B run, and one way out."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from agent.command import fail
from agent.config import TrialConfig, build_config
from agent.ending import UNSENT, Ending, ending_of, lost_peer
from agent.lottery import run_chain
from agent.report import NAME, write_ended
from agent.tracking.artifacts import fetch_best, fetch_checkpoint
from agent.tracking.environment import find_run, is_offline, load_environment, wandb_mode
from agent.tracking.repair import close_run
from agent.tracking.rounds import UploadedRounds, round_trackers
from agent.tracking.run import leave_sweep, may_fetch, start_wandb, wandb_tracker
from agent.tracking.stop_cause import was_asked_to_end
from agent.trial import check_start, first_network, run_trial
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError, flatten, to_yaml
from diffusion_core.data.announcement import advise, announce_data, look_at_data
from diffusion_core.data.datasets import DataError, Dataset, load_data
from diffusion_core.distributed import WATCH_EVERY_S, Peers, first_process_first, make_accelerator
from diffusion_core.evaluation.extractors.find import check_extractors
from diffusion_core.files import write_json
from diffusion_core.hardware import pick_device
from diffusion_core.machine.assigned import note_trial
from diffusion_core.machine.launchers import watch_launchers
from diffusion_core.redact import recorded_console
from diffusion_core.run_folder import CHECKPOINTS, RUN_FILE, SAMPLES, check_folder, locked, make_folder, read_run_file
from diffusion_core.runs.inputs import check_as_others
from diffusion_core.runs.result import TrialResult
from diffusion_core.runs.unwritten import or_told
from diffusion_core.signals import remembered
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import NullTracker, Tracker
from diffusion_core.training import callbacks
from diffusion_core.training.batch_size import as_resumed, settled, settled_again
from diffusion_core.training.resume import find_checkpoint, kept_knobs
from diffusion_core.training.stopping import StopRequest
from pruning.checks import check_processes
from pruning.estimate import describe_model
from pruning.lottery.rounds import Round

if TYPE_CHECKING:
    from agent.tracking.run import Run

LAST_WORDS_S = 15.0
"""Seconds to wait for W&B when a trial must end at once: another process died, or a second signal came."""


def run_session(config: TrialConfig, greeting: str = "") -> int:
    """Run a trial with W&B, from reading data to the last upload. Return the exit status.

    Args:
        config: every knob.
        greeting: printed once nothing can be refused any more.
    """
    load_environment()
    try:
        mode, accelerator = wandb_mode(), make_accelerator(config.train)
        check_processes(config.prune, accelerator.num_processes)
    except ConfigError as error:
        return fail(str(error))
    peers = Peers(accelerator)
    with StopRequest(peers.agree).listening() as stop, ExitStack() as stack:
        watch_launchers(functools.partial(_abandoned, stop))
        return Session(config, mode, accelerator, peers, stop, stack, greeting).run()


def dry_run(config: TrialConfig, *, everything: bool = False) -> int:
    """Check all that a run checks before it starts, and print what it would train. Return the exit status.

    Args:
        config: every knob.
        everything: whether to print all settings, instead of those that differ from the preset.
    """
    load_environment()
    try:
        wandb_mode()
        pick_device(config.train)
        check_extractors(config.eval)
        _, folder = find_run(config.log.dir)
        check_folder(folder)
        checkpoints = folder / CHECKPOINTS
        config = as_resumed(config, checkpoints)
        data, num_classes = look_at_data(config.data, progress=config.log.progress)
        resumed = find_checkpoint(config, checkpoints, longer=True)
        if resumed is not None:
            origin, network = f"continues from {str(resumed.path)!r}", resumed.network()
        else:
            start = check_start(config, num_classes)
            origin = "new weights" if start.source is None else repr(str(start.source.checkpoint.path))
            network = first_network(config, num_classes, start.source)
    except (ConfigError, DataError, CheckpointError) as error:
        return fail(str(error))
    preset = build_config({"preset": config.preset})
    print("# all settings" if everything else f"# settings other than those of --preset={config.preset}")
    print(to_yaml(config, without_secrets=True, beyond=None if everything else preset), end="")
    lines = [*data, f"start: {origin}", *describe_model(network, config, config.prune)]
    print(*(f"# {line}" for line in lines), sep="\n")
    return 0


def _abandoned(stop: StopRequest, launcher: int) -> None:
    say(f"process {launcher}, which started this trial, is gone; the trial stops")
    stop.ask(signal.SIGTERM)


@dataclass
class Session:
    """A trial on one of its processes.

    Attributes:
        config: every knob.
        mode: W&B's mode.
        accelerator: processes and devices.
        peers: the other processes.
        stop: whether a signal asked to stop.
        stack: closed when the session is over.
        greeting: printed once nothing can be refused any more.
        folder: the run's folder, once it is known.
        run_id: the run's id, likewise.
        tracker: receives figures.
        wandb_run: the W&B run, once it has started.
        uploaded: a lottery's rounds on W&B, if it continues from them.
        preemptions: number of times that the run was preempted.
    """

    config: TrialConfig
    mode: str
    accelerator: Accelerator
    peers: Peers
    stop: StopRequest
    stack: ExitStack
    greeting: str = ""
    folder: Path | None = None
    run_id: str = ""
    tracker: Tracker = field(default_factory=NullTracker)
    wandb_run: Run | None = None
    uploaded: UploadedRounds | None = None
    preemptions: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which alone writes, prints and uploads."""
        return self.accelerator.is_main_process

    @property
    def is_lottery(self) -> bool:
        """Whether the trial is a lottery rather than one training."""
        return self.config.prune.method == "lottery"

    def run(self) -> int:
        """Run the trial and leave. Return the exit status."""
        if self.is_main and self.mode != "disabled":
            self.stop.later()
        for number in remembered():  # They came during the imports.
            self.stop.ask(number)
        self.peers.watch(lambda: self._close_in_time(lost_peer(self.peers.loss())))
        try:
            error: Exception | None = None
            try:
                self._print_result(self._run_trial())
            except Exception as raised:
                error = raised
            return self._leave(self._ending(error))
        except KeyboardInterrupt as interrupt:  # It may come at any time, also while leaving.
            return self._leave(self._ending(interrupt))

    def _ending(self, error: BaseException | None) -> Ending:
        """Return how the trial ended on this process."""
        ending = ending_of(error, self.folder)
        if not ending.known and self._has_lost_a_peer():
            return lost_peer(self.peers.loss())
        return ending

    def _has_lost_a_peer(self) -> bool:
        """Whether another process died. Then the connection to it breaks first, and only later is the process gone."""
        for _ in range(4 if self.peers.count > 1 else 0):
            if self.peers.are_gone():
                return True
            time.sleep(WATCH_EVERY_S)
        return False

    def _leave(self, ending: Ending) -> int:
        """Leave the trial, however it ended: note it, print it, tell W&B. Return the exit status."""
        if ending.preempted and self.is_main and self.folder is not None:
            with or_told("this preemption is not noted"):
                self._hand_back(self.folder)
        if ending.alert is not None:
            self.tracker.alert(ending.alert, ending.message.removeprefix("error: "))
        if ending.message and (ending.everywhere or self.is_main):
            say(ending.message)
        status = ending.status
        if ending.together:
            status = self._close(ending)
            self.peers.wait()  # Launchers stop all processes once one has ended, and the first one still uploads.
        elif self.peers.count == 1 and not ending.hurry:
            status = self._close(ending)
        else:
            self.peers.part()
            if not self._close_in_time(ending):
                os._exit(ending.status)  # At a normal exit, W&B's client would wait for the server.
        self.peers.part()
        return status

    def _hand_back(self, folder: Path) -> None:
        """Have W&B give the trial to another agent, and count the preemption. Alert when there are many."""
        if self.wandb_run is None and self.mode == "online" and "WANDB_RUN_ID" in os.environ:
            # The signal came before the run had started here. W&B knows it: an agent or a launcher created it.
            make_folder(folder)
            self._start_run(self.config, self.run_id, folder)
        if self.wandb_run is not None and not is_offline(self.wandb_run) and not self.stop.asked_to_end():
            self._mark_preempting(self.wandb_run)
        if not folder.is_dir():  # The run has not begun, and nobody knows it.
            return
        self.preemptions += 1
        self.tracker.summary({"preemptions": self.preemptions})
        if self.preemptions == callbacks.PREEMPTIONS:
            self.tracker.alert(callbacks.PREEMPTED, f"This trial was preempted {self.preemptions} times")
        write_json(folder / RUN_FILE, read_run_file(folder) | {"id": self.run_id, "preemptions": self.preemptions})

    def _close(self, ending: Ending) -> int:
        """End the W&B run. Return the exit status: that of the ending, or UNSENT if only W&B lacks something."""
        folder, arrived = self.folder, False
        with or_told("what W&B lacks is not noted") as failures:
            arrived = folder is None or close_run(self.tracker, folder, ending.told, preempted=ending.preempted)
        if arrived and self.is_main:
            note_trial(None)
        return ending.status or (0 if arrived else next(iter(failures), UNSENT))

    def _close_in_time(self, ending: Ending) -> bool:
        """Close within LAST_WORDS_S. Return whether that was enough."""
        closing = threading.Thread(target=self.tracker.close, args=(ending.told,), daemon=True)
        closing.start()
        closing.join(LAST_WORDS_S)
        return not closing.is_alive()

    def _run_trial(self) -> TrialResult:
        config, accelerator = self.config, self.accelerator
        # All processes use the first one's folder, and find the same checkpoint in it.
        self.run_id, self.folder = run_id, _ = broadcast_object_list([*find_run(config.log.dir)])
        config = config.model_copy(update={"log": config.log.model_copy(update={"dir": str(self.folder)})})
        check_folder(self.folder)
        check_extractors(config.eval)  # Not before the processes watch each other: one alone may lack a file.
        with self.stop.at_once():  # There is nothing to save yet.
            with first_process_first(accelerator):  # The first process downloads, the others read its files.
                dataset = load_data(config.data, progress=config.log.progress and self.is_main)
            checkpoints = (Round(0).folder(self.folder) if self.is_lottery else self.folder) / CHECKPOINTS
            config = settled(config, accelerator, dataset, checkpoints)
            self._refuse_early(config, dataset)
        self.stop.check_now()
        if self.is_main and self.greeting:
            say(self.greeting)
        if self.is_main:
            make_folder(self.folder)
            self.stack.enter_context(locked(self.folder))
            announce_data(config.data, dataset, advise(config.model, config.train, dataset))
            self.preemptions = read_run_file(self.folder).get("preemptions", 0)
            note_trial(self.folder)
            if self.mode != "disabled":
                self._start_tracking(config, run_id, self.folder)
        self.peers.wait()
        config = settled_again(config, self.config.train, accelerator, checkpoints)
        run = run_trial
        if self.is_lottery:
            run = functools.partial(run_chain, open_tracker=round_trackers(run_id, self.mode), uploaded=self.uploaded)
        begin = functools.partial(run, config, self.tracker, dataset=dataset, folder=self.folder, run_id=run_id)
        return begin(stop=self.stop, accelerator=accelerator)

    def _refuse_early(self, config: TrialConfig, dataset: Dataset) -> None:
        """Check what the trial resumes or starts from before a W&B run exists.

        A run that W&B knows may go on from its checkpoints there, and then needs neither this machine's nor the one
        that it started from. Its trial checks them after it has fetched its own.
        """
        assert self.folder is not None
        is_known = "WANDB_RUN_ID" in os.environ or "id" in read_run_file(self.folder)
        (elsewhere,) = broadcast_object_list([self.mode == "online" and config.checkpoint.resume and is_known])
        try:
            resumed = find_checkpoint(config, self.folder / CHECKPOINTS, longer=True, together=True)
        except CheckpointError:  # All are damaged. W&B may have intact ones.
            return
        if resumed is None and not elsewhere:
            with first_process_first(self.accelerator):  # The first process downloads, the others read its files.
                try:
                    start = check_start(config, dataset.num_classes)
                except CheckpointError as error:  # Here it is wrong input. In a trial, it is a failure.
                    raise ConfigError(str(error)) from None
            check_as_others(self.folder, functools.partial(start.taken, config, dataset))

    def _start_tracking(self, config: TrialConfig, run_id: str, folder: Path) -> None:
        """Start the W&B run, make its tracker, and fetch the checkpoints to continue from."""
        run = self._start_run(config, run_id, folder)
        if may_fetch(run, config.checkpoint):
            with self.stop.at_once():
                if self.is_lottery:
                    self.uploaded = UploadedRounds(run)
                else:
                    if (fetched := fetch_checkpoint(run, folder / CHECKPOINTS)) is not None:
                        run.config.update(kept_knobs(self.config, fetched.metadata["config"]), allow_val_change=True)
                    fetch_best(run, folder / CHECKPOINTS)
        if os.environ.get("WANDB_CONSOLE") != "off" and hasattr(run, "write_logs"):
            self.stack.enter_context(recorded_console(run.write_logs))

    def _start_run(self, config: TrialConfig, run_id: str, folder: Path) -> Run:
        sweep_id = leave_sweep() if self.is_lottery else None
        group = run_id if self.is_lottery and "WANDB_RUN_GROUP" not in os.environ else None
        run = self.wandb_run = start_wandb(
            run_id, folder, flatten(config), self.mode, group=group, sweep_id=sweep_id, on_stop=self.stop.ask
        )
        self.tracker = wandb_tracker(run, folder, config.checkpoint, self.mode)
        self.stop.asked_to_end = functools.partial(was_asked_to_end, run)
        if not is_offline(run):
            self.stop.mark_preempting = functools.partial(self._mark_preempting, run)
            if run.resumed:
                self.preemptions = max(self.preemptions, int(run.summary.get("preemptions") or 0))
        self.stop.ready()
        return run

    def _mark_preempting(self, run: Run) -> None:
        # A launcher also sends SIGTERM after one process died. Such a trial failed, and must not be repeated.
        if not self.peers.are_gone():
            with contextlib.suppress(Exception):  # W&B refuses it for a run that is over.
                run.mark_preempting()

    def _print_result(self, result: TrialResult) -> None:
        if not self.is_main or self.folder is None:
            return
        shown = {key: value for key, value in result.figures.items() if key.startswith(("val/", "eval/", "prune/"))}
        print(f"finished {result.run_id} at step {result.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in shown.items()))
        pictures = self.folder if self.is_lottery else self.folder / SAMPLES
        print(f"best checkpoint: {result.best_checkpoint}; pictures: {pictures}")
        if self.is_lottery:
            write_ended(self.folder, self.folder / NAME, forked=False)
