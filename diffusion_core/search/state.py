"""The state of an offline sweep: its trials, in one file, and a lock so that one process at a time runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from diffusion_core.files import write_text
from diffusion_core.messages import shortened
from diffusion_core.run_folder import SWEEP_LOCK, SWEEP_STATE, SWEEP_TRIALS, Held, held
from diffusion_core.search import engine
from diffusion_core.search.sweep import Sweep, SweepError

FREE_TO_CHANGE = frozenset({"run_cap", "description"})
"""Settings that may change when a sweep resumes. All others decide what its trials are, or which of them is best."""

FIXED = "fixed"
"""Key of the file: the values that all trials have from the command, by dotted key. Base files may change unseen."""
UNSET = object()
"""Stands for the value of a key that the command does not set."""

WAITING = "waiting"
RUNNING = "running"
SUBMITTED = "submitted"
STOPPING = "stopping"
FINISHED = "finished"
STOPPED = "stopped"
FAILED = "failed"
DONE = frozenset({FINISHED, STOPPED, FAILED})


@dataclass
class Trial:
    """A trial that the search engine suggested.

    Attributes:
        id: its run id.
        parameters: what the engine suggested.
        state: ``waiting`` (to start, resume or retry), ``running`` (a process of this machine), ``submitted`` (a job of
            a cluster), ``stopping`` (early termination told it to end), ``finished``, ``stopped`` or ``failed``.
        failures: number of failures.
        seconds: wall time of its processes.
        job: id of its job on a cluster; empty: submitted, but the cluster has not said the id; None: no job.
    """

    id: str
    parameters: dict[str, Any]
    state: str = WAITING
    failures: int = 0
    seconds: float = 0.0
    job: str | None = None


class SweepState:
    """The trials of an offline sweep, in the order of their suggestion.

    Args:
        sweep: a checked sweep file.
        folder: the sweep's folder. A sweep in it is resumed.
        retry_failed: whether trials that had failed wait to be run again.

    Attributes:
        trials: the trials.
        lost: set once another process has taken the sweep over: then nothing more is written. None: none can.

    Raises:
        SweepError: if the folder holds a sweep with another content, or a damaged one.
    """

    def __init__(self, sweep: Sweep, folder: Path, *, retry_failed: bool = False) -> None:
        self.content = engine.plain(sweep.config)
        self.fixed = sweep.command.fixed(sweep.parameters)
        self.folder = folder
        self.retry_failed = retry_failed
        self.trials: list[Trial] = []
        self.lost: Event | None = None
        self._stored_content = f'"sweep": {json.dumps(self.content)}, "{FIXED}": {json.dumps(self.fixed)}'
        self._stored_trials: dict[str, str] = {}
        self.read()

    def read(self) -> None:
        """Read the file, if it exists."""
        try:
            stored = json.loads((self.folder / SWEEP_STATE).read_text(encoding="utf-8"))
            content, fixed = stored["sweep"], dict(stored.get(FIXED, self.fixed))  # Earlier versions did not note it.
            trials = [Trial(**trial) for trial in stored["trials"]]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            raise SweepError(
                f"{str(self.folder)!r}: its {SWEEP_STATE} is damaged; give this sweep another --name, or delete it"
            ) from None
        if _decisive(content) != _decisive(self.content):
            key, had, has = _first_difference(_decisive(content), _decisive(self.content))
            raise SweepError(
                f"{key} = {_shown(has)}: the sweep in {str(self.folder)!r} has {_shown(had)}; set it back in the sweep "
                "file, or give this sweep another --name"
            )
        self._check_fixed(fixed)
        for trial in trials:
            if self.retry_failed and trial.state == FAILED:
                trial.state, trial.failures = WAITING, 0
        self.trials, self._stored_trials = trials, {}

    def _check_fixed(self, before: Mapping[str, Any]) -> None:
        """Refuse trials that would have other settings than those before, with which they are ranked."""
        for key in {**before, **self.fixed}:
            had, has = (values.get(key, UNSET) for values in (before, self.fixed))
            if had != has:
                raise SweepError(
                    f"{key} = {_shown(has)}: the trials in {str(self.folder)!r} have {_shown(had)}, by the files and "
                    "words of the command; set it back, or give this sweep another --name"
                )

    def write(self, *changed: Trial) -> None:
        """Write the file atomically.

        Args:
            changed: the trials that have changed since the last time; none: all. New ones need not be among them.

        Raises:
            SweepError: if the file system refuses, for example because it is full.
            KeyboardInterrupt: if another process has taken the sweep over.
        """
        if self.lost is not None and self.lost.is_set():
            raise KeyboardInterrupt
        stored = self._stored_trials
        # One line a trial, and no indentation: Python writes that ten times as slowly.
        for trial in (*self.trials[len(stored) :], *(changed or self.trials)):
            stored[trial.id] = json.dumps(vars(trial))
        trials = ",\n".join(stored.values())
        file = self.folder / SWEEP_STATE
        try:
            write_text(file, f'{{{self._stored_content}, "trials": [\n{trials}\n]}}\n')
        except OSError as error:
            raise SweepError(f"{str(file)!r}: {error.strerror}; free some space, then repeat the command") from None

    def trial_folder(self, trial: Trial) -> Path:
        """Return the folder of a trial."""
        return self.folder / SWEEP_TRIALS / trial.id

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the sweep's lock inside this context, after reading what other processes wrote.

        Raises:
            SweepError: if another process holds it, or the folder cannot be written.
        """
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(held(self.folder / SWEEP_LOCK))
            except OSError as error:
                raise SweepError(f"{str(self.folder)!r}: {error.strerror}; choose another --out") from None
            except Held as other:
                raise SweepError(
                    f"{str(self.folder)!r} is being run by process {other}; wait until that has ended, or give this "
                    "sweep another --name"
                ) from None
            self.read()
            yield


def _decisive(content: Any) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in FREE_TO_CHANGE}


def _first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any]:
    """Return the dotted key of the first difference between two unequal contents, and its value in both."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return key, before, now
    pairs = {name: (before.get(name, UNSET), now.get(name, UNSET)) for name in {**before, **now}}
    name = next(name for name, (had, has) in pairs.items() if had != has)
    return _first_difference(*pairs[name], f"{key}.{name}" if key else name)


def _shown(value: Any) -> str:
    return "no value" if value is UNSET else shortened(value)
