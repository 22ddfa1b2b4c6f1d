"""Print the progress of a sweep: starts and ends of trials, their ranks, and the remaining time."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path

from diffusion_core.config.ranking import trial_order
from diffusion_core.machine.jobs import NO_SPACE, OTHER_INPUT, Outcome
from diffusion_core.messages import duration
from diffusion_core.search.results import parameters_line
from diffusion_core.search.state import DONE, FAILED, FINISHED, STOPPED, SweepState, Trial
from diffusion_core.search.sweep import Sweep
from diffusion_core.search.trials import TrialReader

NOT_MEASURED = (0, 2, 0.0)
"""Place of a trial that ended without the metric, in the order of trials."""


class SweepProgress:
    """Prints one line for each start and end of a trial.

    Args:
        jobs: number of trials that run at the same time.
    """

    def __init__(self, sweep: Sweep, state: SweepState, reader: TrialReader, jobs: int) -> None:
        self.sweep = sweep
        self.state = state
        self.reader = reader
        self.jobs = jobs
        self._numbers: dict[str, int] = {}
        self._placed: dict[str, tuple[int, int, float]] = {}
        self._places: list[tuple[int, int, float]] = []

    def started(self, trial: Trial) -> None:
        """Report the start of a trial's process."""
        verb = "continues" if trial.seconds else "starts"
        verb = f"{verb} as job {trial.job}" if trial.job else verb
        print(f"{self._name(trial)} {verb}: {parameters_line(trial.parameters, self.sweep.varied)}", flush=True)

    def ended(self, trial: Trial, outcome: Outcome, under_way: Sequence[float], log: Path | None) -> None:
        """Report the end of a trial's process or job.

        Args:
            outcome: how it ended.
            under_way: seconds that each of the other running trials has run.
            log: file of the process's output; None: the terminal.
        """
        parts = [self._outcome(trial, outcome)]
        if trial.state in (FINISHED, STOPPED):
            parts += self._rank(trial)
        elif trial.failures and log is not None:
            parts.append(f"see {log}")
        parts.append(duration(trial.seconds))
        left = self.seconds_left(under_way)
        if left and trial.state in DONE:
            parts.append(f"about {duration(left)} left")
        print(f"{self._name(trial)} {', '.join(parts)}", flush=True)

    def seconds_left(self, under_way: Sequence[float]) -> float | None:
        """Return the expected wall time until the sweep ends, from the finished trials; None if it is unknown."""
        ended = [trial.seconds for trial in self.state.trials if trial.state in DONE]
        if self.sweep.total is None or not ended:
            return None
        mean = sum(ended) / len(ended)
        spent = sum(min(seconds, mean) for seconds in under_way)
        return max(0.0, mean * (self.sweep.total - len(ended)) - spent) / self.jobs

    def _name(self, trial: Trial) -> str:
        total = f"/{self.sweep.total}" if self.sweep.total is not None else ""
        for known in self.state.trials[len(self._numbers) :]:
            self._numbers[known.id] = len(self._numbers) + 1
        return f"[{self._numbers[trial.id]}{total}] {trial.id}"

    @staticmethod
    def _outcome(trial: Trial, outcome: Outcome) -> str:
        how = f" ({outcome.reason})" if outcome.reason else f" with status {outcome.code}"
        if trial.state == STOPPED:
            return "stopped early"
        if trial.state == FAILED:
            return f"failed again{how}"
        if trial.state == FINISHED:
            return "finished"
        if outcome.code == NO_SPACE:
            return "ended, as the disk is full"
        if outcome.code == OTHER_INPUT:
            return "not started, as an input has changed"
        if outcome.interrupted:
            return f"interrupted{how}, runs again"
        return f"failed{how} and runs once more" if trial.failures else "interrupted"

    def _rank(self, trial: Trial) -> list[str]:
        if self.sweep.several:
            return self._objectives(trial)
        metric = self.sweep.metric
        if metric is None:
            return []
        for done in self.state.trials:  # Each is placed once: sorting all of them for each would take ever longer.
            if done.state in DONE and done.id not in self._placed:
                record = self.reader.record(done)
                self._placed[done.id] = trial_order(record, metric, maximize=self.sweep.maximize)
                insort(self._places, self._placed[done.id])
        figures = self.reader.record(trial).figures
        if metric not in figures:
            return []
        rank = bisect_left(self._places, self._placed[trial.id]) + 1
        measured = bisect_left(self._places, NOT_MEASURED)
        return [f"{metric} {figures[metric]:.4g}", f"rank {rank} of {measured}"]

    def _objectives(self, trial: Trial) -> list[str]:
        """Return the objectives of a trial, and whether it is on the Pareto front so far."""
        own = next(record for record in self.reader.ranked() if record.id == trial.id)
        shown = [each.name for each in self.sweep.objectives if each.name in own.figures]
        figures = [f"{name} {own.figures[name]:.4g}" for name in shown]
        return [*figures, *(["on the front"] if own.front else [])]
