"""Run a sweep without a server: a search suggests trials, as W&B's own engine does, and a launcher runs several.

They are processes of this machine, or jobs of a cluster, which outlive this process.

The sweep survives a kill at any moment. Its folder:

runs/sweeps/NAME/
    sweep.json                   the sweep and the state of its trials
    trials/ID/                   the folder of each trial, with its offline W&B run
    ID-samples.png, ID-diffusion.gif, results.csv, results.json
    front.json                   the Pareto front, if there are several objectives
    optuna.journal               the study of a search by Optuna
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_core.files import DISK_FULL
from diffusion_core.machine.jobs import NO_SPACE, OTHER_INPUT, Job, Launcher, Outcome, Task
from diffusion_core.machine.processes import end_orphan
from diffusion_core.machine.sharing import shares
from diffusion_core.registries import LAUNCHERS
from diffusion_core.runs.inputs import refusal_in
from diffusion_core.search import engine
from diffusion_core.search.macros import expand_command
from diffusion_core.search.progress import SweepProgress
from diffusion_core.search.results import TrialRecord, write_results
from diffusion_core.search.state import (
    DONE,
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    STOPPING,
    SUBMITTED,
    WAITING,
    SweepState,
    Trial,
)
from diffusion_core.search.sweep import Sweep, SweepError
from diffusion_core.search.trials import TrialReader

PARAMETERS_FILE = "parameters.json"
"""File in a trial's folder with its parameters, if the sweep's command asks for it."""

POLL_SECONDS = 0.1
ATTEMPTS = 2
"""Number of times that a trial is tried: the machine may have caused the first failure."""
FAILURES_IN_A_ROW = 5
"""Number of trials that fail one after the other before nothing more is started: the machine may have broken."""
STOP_GRACE_SECONDS = 120.0
"""Seconds that a trial has to end after early termination stopped it. Then it is killed."""
ID_LENGTH = 40
"""Characters of a sweep's name in its trials' ids. W&B allows 64 in all."""


class NothingWorks(RuntimeError):
    """Several trials failed one after the other."""


@dataclass
class Running:
    """A trial that has a process or a job.

    Attributes:
        trial: the trial.
        job: its process, or its job on a cluster.
        adopted: whether an earlier process of the sweep started it.
        kill_at: when to kill it, if it was told to end.
        history_bytes: size of its history when early termination last checked it.
    """

    trial: Trial
    job: Job
    adopted: bool = False
    kill_at: float | None = None
    history_bytes: int = 0


class OfflineSweep:
    """Runs the trials of a sweep.

    Args:
        sweep: a checked sweep file.
        folder: the sweep's folder. A sweep in it is resumed.
        jobs: number of trials at once, on this machine.
        launcher: where they run instead, and how many at once.
        environment: returns the environment variables of a trial, given its id.
        retry_failed: whether to run the trials again that had failed for good.

    Raises:
        SweepError: if the folder holds a sweep with another content, or a damaged one.
    """

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        jobs: int = 1,
        launcher: Launcher | None = None,
        environment: Callable[[str], Mapping[str, str]] = lambda trial: {},
        *,
        retry_failed: bool = False,
    ) -> None:
        self.sweep = sweep
        self.folder = folder
        self.environment = environment
        self.state = SweepState(sweep, folder, retry_failed=retry_failed)
        self.reader = TrialReader(self.state, sweep.metric, sweep.objectives)
        self.search = sweep.search(folder)
        self.launcher: Launcher = launcher or LAUNCHERS["local"].make(shares(jobs), None)
        self.progress = SweepProgress(sweep, self.state, self.reader, self.launcher.slots)
        self.running: list[Running] = []
        self.exhausted = False
        self.full: Path | None = None
        self.refused: str | None = None

    def ended_trials(self) -> list[Trial]:
        """Return the trials that will not run again."""
        return [trial for trial in self.state.trials if trial.state in DONE]

    def run(self, count: int | None = None) -> list[TrialRecord]:
        """Run trials until none is left, ``count`` were run, or ``run_cap`` or the metric's target is reached.

        Returns:
            All trials of the sweep, best first.

        Raises:
            SweepError: if another process runs this sweep, its command cannot be started, or a disk is full.
            KeyboardInterrupt: if this process was told to stop. The trials have written their checkpoints.
            NothingWorks: if several trials failed one after the other.
        """
        begun: set[str] = set()
        ended: list[str] = []
        with self.state.locked(), self.launcher.locked(self.folder) as self.state.lost:
            self.state.read()  # The last holder wrote until this one had the lease.
            with self.launcher.listening() as received:
                begun |= self._take_over()
                while True:
                    while (
                        not (received or hopeless(ended) or self.full or self.refused)
                        and len(self.running) < self.launcher.slots
                    ):
                        trial = self._next_trial(begun, may_begin=count is None or len(begun) < count)
                        if trial is None:
                            break
                        begun.add(trial.id)
                        self._start(trial)
                    if not self.running:
                        break
                    if received and self.launcher.leave([running.job for running in self.running], received):
                        break
                    time.sleep(POLL_SECONDS)
                    ended += self._end_trials(interrupted=bool(received))
                    self._stop_bad_trials()
            self.state.write()
            if self.full is None:
                write_results(self.folder, self.reader.ranked(), self.sweep.objectives)
        if received:
            raise KeyboardInterrupt
        if self.full is not None:
            raise SweepError(f"{str(self.full)!r}: the disk is full; free some space, then repeat the command")
        if self.refused is not None:
            raise SweepError(self.refused)
        if hopeless(ended):
            failed = f"the last {FAILURES_IN_A_ROW} trials failed; nothing more is started"
            raise NothingWorks(f"{failed}; mend the cause, then repeat the command")
        return self.reader.ranked()

    def _take_over(self) -> set[str]:
        """Wait for the processes of a sweep process that was killed, and update the states of their trials.

        Jobs of a cluster go on: they are under way again. Return the ids of their trials. A trial that has lost its
        result or its folder runs again.
        """
        for trial in self.state.trials:
            if self.reader.has_lost(trial):
                trial.state = WAITING
            if trial.state not in (RUNNING, SUBMITTED, STOPPING):
                continue
            folder = self.state.trial_folder(trial)
            if trial.job is not None:
                job = self.launcher.adopt(trial.id, folder, trial.job, self._note_job(trial))
                self.running.append(Running(trial, job, adopted=True))
                if trial.state == STOPPING:
                    self._stop(self.running[-1])
                continue
            end_orphan(folder)
            trial.seconds += self.reader.uncounted_seconds(trial)
            self.reader.drop_damaged(trial)
            if self.reader.has_result(trial):
                trial.state = FINISHED
            else:
                trial.state = STOPPED if trial.state == STOPPING else WAITING
        self.state.write()
        self._copy_pictures(*self.ended_trials())  # A full disk may have refused some.
        return {running.trial.id for running in self.running}

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
        parameters = self.search.suggest([trial.parameters for trial in trials], self.reader.engine_runs)
        if parameters is None:
            self.exhausted = True
            return None
        trial = Trial(self._trial_id(len(trials) + 1), parameters)
        trials.append(trial)
        return trial

    def preview(self) -> str:
        """Return what the launcher would run for the first trial; empty if there is nothing to show.

        Raises:
            ConfigError: if the launcher would refuse it.
        """
        parameters = self.sweep.search().suggest([], list) or {}  # Nothing is written into the sweep's folder.
        return self.launcher.preview(self._task(Trial(self._trial_id(1), parameters), write=False))

    def _trial_id(self, number: int) -> str:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", self.sweep.name)[:ID_LENGTH]
        return f"{name}-{number:03d}-{secrets.token_hex(2)}"

    def _task(self, trial: Trial, *, write: bool = True) -> Task:
        """Return what the launcher runs for a trial. Write the file of its parameters if the command names it."""
        folder = self.state.trial_folder(trial)
        config, parameters = self.sweep.config, trial.parameters | {"log.dir": str(folder)}
        file = folder / PARAMETERS_FILE
        command = expand_command(config.get("command"), parameters, config.get("program"), file, write=write)
        return Task(trial.id, command, dict(self.environment(trial.id)), folder)

    def _note_job(self, trial: Trial) -> Callable[[str | None], None]:
        """Return what notes a trial's job. It is noted before the start: the next sweep process must know of it."""

        def note(job: str | None) -> None:
            trial.state, trial.job = RUNNING if job is None else SUBMITTED, job
            self.state.write(trial)

        return note

    def _start(self, trial: Trial) -> None:
        """Start a trial."""
        try:
            job = self.launcher.start(self._task(trial), self._note_job(trial))
        except OSError as error:
            trial.state, trial.job = WAITING, None
            self.state.write(trial)
            if error.errno not in DISK_FULL:
                raise SweepError(f"command = {str(error.filename)!r}: {error.strerror}") from None
            self.full = self.state.trial_folder(trial)
            return
        self.running.append(Running(trial, job))
        self.progress.started(trial)

    def _end_trials(self, interrupted: bool) -> list[str]:
        """Update the trials that have ended. Return the states of those that are done."""
        states = []
        for running in list(self.running):
            outcome, trial = running.job.poll(), running.trial
            if outcome is None:
                if running.kill_at is not None and time.monotonic() > running.kill_at:
                    running.kill_at = time.monotonic() + STOP_GRACE_SECONDS
                    running.job.kill()
                continue
            self.running.remove(running)
            total = running.job.total_seconds
            trial.seconds = trial.seconds + running.job.seconds if total is None else total
            self._set_ended_state(trial, outcome, interrupted)
            trial.job = None
            self.state.write(trial)
            if outcome.code != NO_SPACE:
                self._copy_pictures(trial)
            elif trial.state == WAITING and not running.adopted:  # Since an adopted one ended, there may be room again.
                self.full = self.state.trial_folder(trial)
            log = self.launcher.log(self.state.trial_folder(trial))
            if outcome.code == OTHER_INPUT and not running.adopted:
                self.refused = f"{trial.id}: {refusal_in(log)}"
            self.progress.ended(trial, outcome, [other.job.seconds for other in self.running], log)
            if trial.state in DONE:
                states.append(trial.state)
        return states

    def _copy_pictures(self, *trials: Trial) -> None:
        if not all(self.reader.copy_pictures(trial) for trial in trials):
            self.full = self.folder

    def _set_ended_state(self, trial: Trial, outcome: Outcome, interrupted: bool) -> None:
        """Set the state of a trial that ended."""
        finished = outcome.lost or outcome.code == 0
        if outcome.lost or trial.state == STOPPING:
            finished = finished and self.reader.has_result(trial)
        if finished:
            trial.state = FINISHED
        elif trial.state == STOPPING:
            trial.state = STOPPED
        elif interrupted or outcome.interrupted or outcome.code in (NO_SPACE, OTHER_INPUT):
            trial.state = WAITING
        else:
            trial.failures += 1
            trial.state = FAILED if trial.failures >= ATTEMPTS else WAITING

    def _stop_bad_trials(self) -> None:
        """Stop the trials that early termination gives up, if any history has grown."""
        if "early_terminate" not in self.sweep.config:
            return
        sizes = [self.reader.history_bytes(running.trial) for running in self.running]
        if sizes == [running.history_bytes for running in self.running]:
            return
        sweep = self.sweep
        doomed = engine.doomed_by_all(sweep.engine_config(), sweep.objectives, self.reader.engine_runs())
        for running, size in zip(self.running, sizes, strict=True):
            running.history_bytes = size
            if running.trial.id in doomed and running.trial.state in (RUNNING, SUBMITTED):
                running.trial.state = STOPPING
                self.state.write(running.trial)
                self._stop(running)

    @staticmethod
    def _stop(running: Running) -> None:
        """Tell a trial to end for good."""
        running.kill_at = time.monotonic() + STOP_GRACE_SECONDS
        running.job.stop()


def hopeless(ended: Sequence[str]) -> bool:
    """Return whether the trials that ended last have failed, so many in a row that no further one should start."""
    last = ended[-FAILURES_IN_A_ROW:]
    return len(last) == FAILURES_IN_A_ROW and set(last) == {FAILED}
