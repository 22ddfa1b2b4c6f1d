"""Read the trials of an offline sweep, for the search engine and the results."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusion_core.checkpoint import (
    METADATA_FILE,
    CheckpointError,
    list_checkpoints,
    read_checkpoint,
    step_folder,
    step_of,
)
from diffusion_core.choice import best_of
from diffusion_core.config.metrics import COSTS, goal_of, is_better
from diffusion_core.config.ranking import judged, trial_order
from diffusion_core.files import DISK_FULL, replaced_file
from diffusion_core.machine.job import read_note
from diffusion_core.machine.processes import began_at
from diffusion_core.messages import reason_of
from diffusion_core.run_folder import (
    CHECKPOINTS,
    HISTORY_FILE,
    RESULT_FILE,
    RUN_FILE,
    SAMPLES,
    best_figures,
    read_history,
)
from diffusion_core.runs.result import stored_result
from diffusion_core.search import engine
from diffusion_core.search.objectives import Objective
from diffusion_core.search.results import TrialRecord, by_front
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
from diffusion_core.tracking import STEP

ENGINE_STATES = {WAITING: "running", RUNNING: "running", SUBMITTED: "running", STOPPING: "running",
                 FINISHED: "finished", STOPPED: "finished", FAILED: "failed"}  # fmt: skip


class TrialReader:
    """Reads the folders of trials; reads each ended trial only once.

    Args:
        state: state of the sweep.
        metric: the figure that trials are sorted by, or None.
        objectives: if there are several, trials are sorted by their Pareto front instead.
    """

    def __init__(self, state: SweepState, metric: str | None, objectives: Sequence[Objective] = ()) -> None:
        self.state = state
        self.metric = metric
        self.objectives = objectives
        self._qualities = [each.name for each in objectives if each.name not in COSTS]
        self._ended_runs: dict[str, Any] = {}
        self._ended_records: dict[str, TrialRecord] = {}

    def has_result(self, trial: Trial) -> bool:
        """Return whether a trial has a result that can be read."""
        return stored_result(self.state.trial_folder(trial)) is not None

    def drop_damaged(self, trial: Trial) -> bool:
        """Delete the result of a trial that has no process if it is damaged. Return whether it was."""
        file = self.state.trial_folder(trial) / RESULT_FILE
        damaged = file.is_file() and not self.has_result(trial)
        if damaged:
            file.unlink()
        return damaged

    def has_lost(self, trial: Trial) -> bool:
        """Return whether an ended trial lacks what it measured, and say in one line what is gone.

        That is its folder, or of a finished trial of this product its result. Other commands may write no result.
        """
        folder = self.state.trial_folder(trial)
        if trial.state == FINISHED and self.drop_damaged(trial):
            return True
        if trial.state in (FINISHED, STOPPED) and not folder.is_dir():
            print(
                f"{trial.id}: {str(folder)!r} is gone, so it runs again; to keep what it measured, stop this sweep, "
                "and move the folder back",
                file=sys.stderr,
            )
            trial.seconds = 0.0
            return True
        lost = trial.state == FINISHED and (folder / RUN_FILE).is_file() and not (folder / RESULT_FILE).is_file()
        if lost:
            gone = f"{str(folder / RESULT_FILE)!r} is gone"
            print(f"{trial.id}: {gone}, so it goes on from its last checkpoint and writes it anew", file=sys.stderr)
        return lost

    def uncounted_seconds(self, trial: Trial) -> float:
        """Return how long the last process of a trial ran, as far as its files tell: nobody saw it end."""
        folder = self.state.trial_folder(trial)
        began = began_at(folder)
        if began is None:
            return 0.0
        signs = [file for name in (HISTORY_FILE, METADATA_FILE, RESULT_FILE) for file in folder.rglob(name)]
        return max([0.0, *(file.stat().st_mtime - began for file in signs)])

    def history_bytes(self, trial: Trial) -> int:
        """Return the size of a trial's history, which grows with each row."""
        file = self.state.trial_folder(trial) / HISTORY_FILE
        return file.stat().st_size if file.is_file() else 0

    def engine_runs(self) -> list[Any]:
        """Return all trials as runs of the search engine."""
        return [self._engine_run(trial) for trial in self.state.trials]

    def _engine_run(self, trial: Trial) -> Any:
        if trial.id in self._ended_runs:
            return self._ended_runs[trial.id]
        history = read_history(self.state.trial_folder(trial))
        result = self._result(trial)
        figures = self._together(trial, best_figures(history) | dict(result.get("figures", {})), result, history)
        run = engine.past_run(trial.id, trial.parameters, ENGINE_STATES[trial.state], figures, history)
        if trial.state in DONE:
            self._ended_runs[trial.id] = run
        return run

    def records(self) -> list[TrialRecord]:
        """Return the results of all trials, in the order of their creation."""
        return [self.record(trial) for trial in self.state.trials]

    def ranked(self) -> list[TrialRecord]:
        """Return the results of all trials, best first; with several objectives, those on the front first."""
        if len(self.objectives) > 1:
            return by_front(self.records(), self.objectives)
        maximize = self.metric is not None and goal_of(self.metric) == "maximize"
        return sorted(self.records(), key=lambda record: trial_order(record, self.metric, maximize=maximize))

    def reached(self, target: float | None) -> bool:
        """Return whether the metric of a trial that did not fail is as good as a value."""
        if target is None or self.metric is None:
            return False
        values = [judged(record).get(self.metric) for record in self.records()]
        return any(value is not None and (value == target or is_better(self.metric, value, target)) for value in values)

    def record(self, trial: Trial) -> TrialRecord:
        """Return the results of a trial."""
        if trial.id in self._ended_records:
            return self._ended_records[trial.id]
        folder = self.state.trial_folder(trial)
        result, history = self._result(trial), read_history(folder)
        record = TrialRecord(
            id=trial.id,
            state=trial.state,
            parameters=trial.parameters,
            figures=self._together(trial, result.get("figures") or best_figures(history), result, history),
            config=result.get("config", {}),
            best_checkpoint=result.get("best_checkpoint") or (_kept(folder) if trial.state == STOPPED else None),
            seconds=trial.seconds,
            queued=None if (note := read_note(folder)) is None else note.queue_seconds,
        )
        if trial.state in DONE:
            self._ended_records[trial.id] = record
        return record

    def _together(
        self,
        trial: Trial,
        figures: Mapping[str, float],
        result: Mapping[str, Any],
        history: Sequence[Mapping[str, float]],
    ) -> Mapping[str, float]:
        """Return figures, with those of the best checkpoint for several objectives of quality, if it has all of them.

        The best values of the whole run may be of several checkpoints: a point that no checkpoint has.
        """
        if len(self._qualities) < 2:
            return figures
        row = _figures_of_best(self.state.trial_folder(trial) / CHECKPOINTS, result.get("best_checkpoint"), history)
        found = {name: row[name] for name in self._qualities if name in row}
        return {**figures, **found} if len(found) == len(self._qualities) else figures

    def _result(self, trial: Trial) -> dict[str, Any]:
        """Return the result of a trial; empty if it has none."""
        return stored_result(self.state.trial_folder(trial)) or {}

    def copy_pictures(self, trial: Trial) -> bool:
        """Copy the newest images of a trial beside the results, if they are not there. Return whether there was room.

        What else keeps them from being copied is said in one line: the trial has them anyway.
        """
        try:
            for kind, suffix in (("samples", "png"), ("diffusion", "gif")):
                self._copy_picture(trial, kind, suffix)
        except OSError as error:
            if error.errno in DISK_FULL:
                return False
            print(f"warning: {trial.id}: its pictures are not copied: {reason_of(error)}", file=sys.stderr)
        return True

    def _copy_picture(self, trial: Trial, kind: str, suffix: str) -> None:
        newest = max((self.state.trial_folder(trial) / SAMPLES).glob(f"{kind}-*.{suffix}"), default=None)
        target = self.state.folder / f"{trial.id}-{kind}.{suffix}"
        if newest is not None and not _is_copied(newest, target):
            with replaced_file(target) as temporary:
                shutil.copyfile(newest, temporary)


def _is_copied(source: Path, target: Path) -> bool:
    """Return whether a file was copied after its last change, and whole."""
    if not target.is_file():
        return False
    old, new = source.stat(), target.stat()
    return new.st_size == old.st_size and new.st_mtime >= old.st_mtime


def _best_place(checkpoints: Path) -> Path | None:
    """Return where the best checkpoint in a folder of checkpoints is or was; None if none was measured."""
    best = best_of(checkpoints)
    return None if best is None else checkpoints / step_folder(best["step"])


def _kept(folder: Path) -> str | None:
    """Return the checkpoint that commands take of a run without a result: its best one on the disk, or its newest."""
    kept, best = list_checkpoints(folder / CHECKPOINTS), _best_place(folder / CHECKPOINTS)
    return next((str(path) for path in (best, *kept[-1:]) if path in kept), None)


def _figures_of_best(
    checkpoints: Path, named: str | None, history: Sequence[Mapping[str, float]]
) -> Mapping[str, float]:
    """Return what was measured of a run's best checkpoint; empty if that is unknown.

    Args:
        checkpoints: the folder of the run's checkpoints.
        named: the best checkpoint, as the result of a finished run names it.
        history: rows of the run, for a checkpoint that is no longer there.
    """
    place = _best_place(checkpoints) if named is None else Path(named)
    if place is None:
        return {}
    with suppress(CheckpointError):
        figures: Mapping[str, float] = read_checkpoint(place, verify=False).metadata["figures"]
        return figures
    return next((row for row in history if row[STEP] == step_of(place)), {})
