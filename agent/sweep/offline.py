"""Run a sweep without a server: W&B's search engine suggests trials, and several run at once on this machine.

The sweep survives a kill at any moment. Its folder:

runs/sweeps/NAME/
    sweep.json                   the sweep and the state of its trials
    trials/ID/                   the folder of each trial, with its offline W&B run
    ID-samples.png, ID-diffusion.gif
    results.csv, results.json, results.png, report.html
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.report import NAME, write_ended
from agent.sweep import engine
from agent.sweep.file import SweepError, SweepFile
from agent.sweep.macros import expand_command
from agent.sweep.plot import PLOT_FILE, plot_results
from agent.sweep.progress import SweepProgress
from agent.sweep.results import TrialRecord, table, write_results
from agent.sweep.state import DONE, FAILED, FINISHED, RUNNING, STOPPED, STOPPING, WAITING, SweepState, Trial
from agent.sweep.trials import TrialReader
from agent.tracking.environment import OFFLINE_SWEEP
from diffusion_core.machine.processes import end_orphan, forward_signals, kill_group, start_process
from diffusion_core.machine.sharing import shares

LOG_FILE = "console.log"
"""File in a trial's folder with its output, if several trials run at once."""
PARAMETERS_FILE = "parameters.json"
"""File in a trial's folder with its parameters, if the sweep's command asks for it."""

POLL_SECONDS = 0.1
ATTEMPTS = 2
"""Number of times that a trial is tried: the machine may have caused the first failure."""
FAILURES_AT_START = 5
"""Number of failed trials after which the sweep stops if no trial has finished."""
STOP_GRACE_SECONDS = 120.0
"""Seconds that a trial has to end after early termination stopped it. Then it is killed."""
ID_LENGTH = 40
"""Characters of a sweep's name in its trials' ids. W&B allows 64 in all."""


class NothingWorks(RuntimeError):
    """Several trials failed, and none finished."""


@dataclass
class Running:
    """A trial that has a process.

    Attributes:
        trial: the trial.
        process: its process.
        slot: index of its share of the machine.
        started_at: start of the process on the monotonic clock, in seconds.
        kill_at: when to kill it, if it was told to end.
        history_bytes: size of its history when early termination last checked it.
    """

    trial: Trial
    process: subprocess.Popen[bytes]
    slot: int
    started_at: float
    kill_at: float | None = None
    history_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Seconds since the process started."""
        return time.monotonic() - self.started_at


class OfflineSweep:
    """Runs the trials of a sweep on this machine.

    Args:
        sweep: a checked sweep file.
        folder: the sweep's folder. A sweep in it is resumed.
        jobs: number of trials at once.
        shares_of_trials: environment variables with which they share this machine; None: find them out.

    Raises:
        SweepError: if the folder holds a sweep with another content, or a damaged one.
    """

    def __init__(
        self, sweep: SweepFile, folder: Path, jobs: int = 1, shares_of_trials: list[dict[str, str]] | None = None
    ) -> None:
        self.sweep = sweep
        self.folder = folder
        self.state = SweepState(sweep, folder)
        self.reader = TrialReader(self.state, sweep.metric)
        self.shares = shares_of_trials or shares(jobs)
        self.progress = SweepProgress(sweep, self.state, self.reader, len(self.shares))
        self.running: list[Running] = []
        self.exhausted = False

    def ended_trials(self) -> list[Trial]:
        """Return the trials that will not run again."""
        return [trial for trial in self.state.trials if trial.state in DONE]

    def run(self, count: int | None = None) -> list[TrialRecord]:
        """Run trials until none is left, ``count`` were run, or ``run_cap`` or the metric's target is reached.

        Returns:
            All trials of the sweep, best first.

        Raises:
            SweepError: if another process runs this sweep, or its command cannot be started.
            KeyboardInterrupt: if this process was told to stop. The trials have written their checkpoints.
            NothingWorks: if several trials failed, and none finished.
        """
        begun: set[str] = set()
        ended: list[str] = []
        with self.state.locked():
            self._take_over()
            with forward_signals(lambda: [running.process for running in self.running]) as received:
                while True:
                    while not received and not hopeless(ended) and len(self.running) < len(self.shares):
                        trial = self._next_trial(begun, may_begin=count is None or len(begun) < count)
                        if trial is None:
                            break
                        begun.add(trial.id)
                        process = self._start(trial)
                        if received:  # The signal came during the start, before the process could be told.
                            process.send_signal(received[-1])
                    if not self.running:
                        break
                    time.sleep(POLL_SECONDS)
                    ended += self._end_trials(interrupted=bool(received))
                    self._stop_bad_trials()
            write_results(self.folder, self.reader.ranked())
            plot_results(self.folder / PLOT_FILE, self.sweep, self.reader.records())
        if received:
            raise KeyboardInterrupt
        if hopeless(ended):
            raise NothingWorks(f"{len(ended)} trials failed and none came to its end; nothing more is started")
        return self.reader.ranked()

    def _take_over(self) -> None:
        """Wait for the trials of a sweep process that was killed, and update their states."""
        for trial in self.state.trials:
            if trial.state in (RUNNING, STOPPING):
                end_orphan(self.state.trial_folder(trial))
                if self.reader.has_result(trial):
                    trial.state = FINISHED
                else:
                    trial.state = STOPPED if trial.state == STOPPING else WAITING
        self.state.write()

    def _next_trial(self, begun: set[str], may_begin: bool) -> Trial | None:
        """Return a waiting trial, or else a new one; None if there is none.

        Args:
            begun: ids of the trials that this process has run.
            may_begin: whether to return others than these.
        """
        trials = self.state.trials
        waiting = [trial for trial in trials if trial.state == WAITING and (may_begin or trial.id in begun)]
        if waiting or self.exhausted or not may_begin:
            return waiting[0] if waiting else None
        if self.sweep.run_cap is not None and len(trials) >= self.sweep.run_cap:
            return None
        if self.reader.reached(self.sweep.target):
            print(f"metric.target = {self.sweep.target}: reached; no further trial begins", flush=True)
            self.exhausted = True
            return None
        parameters = engine.suggest(self.sweep.engine_config(), self.reader.engine_runs())
        if parameters is None:
            self.exhausted = True
            return None
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", self.sweep.name)[:ID_LENGTH]
        trial = Trial(f"{name}-{len(trials) + 1:03d}-{secrets.token_hex(2)}", parameters)
        trials.append(trial)
        return trial

    def _start(self, trial: Trial) -> subprocess.Popen[bytes]:
        """Start the process of a trial."""
        slot = min(set(range(len(self.shares))) - {running.slot for running in self.running})
        folder = self.state.trial_folder(trial)
        environment = (
            dict(os.environ)
            | self.shares[slot]
            | {
                "WANDB_MODE": "disabled" if os.environ.get("WANDB_MODE") == "disabled" else "offline",
                "WANDB_RUN_ID": trial.id,
                "WANDB_NAME": trial.id,
                "WANDB_RUN_GROUP": self.sweep.name,
                OFFLINE_SWEEP: self.sweep.name,
                "WANDB_SILENT": os.environ.get("WANDB_SILENT", "true"),
            }
        )
        config, parameters = self.sweep.config, trial.parameters | {"log.dir": str(folder)}
        command = expand_command(config.get("command"), parameters, config.get("program"), folder / PARAMETERS_FILE)
        # Write the state first: after a kill, the next sweep process must know that the trial may have a process.
        trial.state = RUNNING
        self.state.write()
        end_orphan(folder)  # A failed attempt may have left a process.
        try:
            process = start_process(command, environment, folder, self._log(trial))
        except OSError as error:
            trial.state = WAITING
            self.state.write()
            raise SweepError(f"command = {command[0]!r}: {error.strerror}") from None
        self.running.append(Running(trial, process, slot, time.monotonic()))
        self.progress.started(trial)
        return process

    def _log(self, trial: Trial) -> Path | None:
        """Return the file of a trial's output, or None for the terminal if no other trial uses that."""
        return self.state.trial_folder(trial) / LOG_FILE if len(self.shares) > 1 else None

    def _end_trials(self, interrupted: bool) -> list[str]:
        """Update the trials whose processes have ended. Return the states of those that are done."""
        states = []
        for running in list(self.running):
            code = running.process.poll()
            if code is None:
                if running.kill_at is not None and time.monotonic() > running.kill_at:
                    kill_group(running.process)
                continue
            if code:
                kill_group(running.process)  # Processes that it started must release the GPUs.
            self.running.remove(running)
            trial = running.trial
            trial.seconds += running.seconds
            self._set_ended_state(trial, code, interrupted)
            self.state.write()
            self.reader.copy_pictures(trial)
            self.progress.ended(trial, code, [other.seconds for other in self.running], self._log(trial))
            if trial.state in DONE:
                states.append(trial.state)
        return states

    def _set_ended_state(self, trial: Trial, code: int, interrupted: bool) -> None:
        """Set the state of a trial whose process ended with an exit status."""
        if trial.state == STOPPING:
            trial.state = FINISHED if code == 0 and self.reader.has_result(trial) else STOPPED
        elif code == 0:
            trial.state = FINISHED
        elif interrupted:
            trial.state = WAITING
        else:
            trial.failures += 1
            trial.state = FAILED if trial.failures >= ATTEMPTS else WAITING

    def _stop_bad_trials(self) -> None:
        """Send SIGTERM to the trials that early termination stops, if any history has grown."""
        if "early_terminate" not in self.sweep.config:
            return
        sizes = [self.reader.history_bytes(running.trial) for running in self.running]
        if sizes == [running.history_bytes for running in self.running]:
            return
        doomed = engine.doomed(self.sweep.engine_config(), self.reader.engine_runs())
        for running, size in zip(self.running, sizes, strict=True):
            running.history_bytes = size
            if running.trial.id in doomed and running.trial.state == RUNNING:
                running.trial.state = STOPPING
                running.kill_at = time.monotonic() + STOP_GRACE_SECONDS
                self.state.write()
                running.process.send_signal(signal.SIGTERM)


def hopeless(ended: Sequence[str]) -> bool:
    """Return whether so many trials failed, and none finished, that no further one should start."""
    return len(ended) >= FAILURES_AT_START and set(ended) == {FAILED}


def run_offline(coordinator: OfflineSweep, count: int | None) -> int:
    """Run an offline sweep and print its table. Return the exit status."""
    sweep, folder = coordinator.sweep, coordinator.folder
    try:
        records = coordinator.run(count)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from here ({folder})", file=sys.stderr)
        return 130
    except NothingWorks as error:
        print(f"error: {error}", file=sys.stderr)
        records = coordinator.reader.ranked()
    print(f"\n{sweep.name}: {len(records)} trials" + (f", best {sweep.metric} first" if sweep.metric else ""))
    print(table(records, sweep.varied, sweep.metric))
    print(f"\nresults.csv, results.json, results.png, sample grids and GIFs: {folder}/")
    print(f"to put it all on W&B: python -m agent.sync {folder}")
    write_ended(folder, folder / NAME)
    return 0 if all(record.state != FAILED for record in records) else 1
