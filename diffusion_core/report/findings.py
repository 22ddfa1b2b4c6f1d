"""What a study found: its winner, the trials that cannot be told from it, fronts and lineages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from diffusion_core.config.ranking import ENDED, judged
from diffusion_core.report.intervals import Interval, may_be_equal, mean_interval, wilson
from diffusion_core.report.study import COUNTED, FINISHED, SHARES, Study, Trial, recipe
from diffusion_core.search.front import pareto_front
from diffusion_core.search.objectives import Front, front_among, point_of
from diffusion_core.tables import cell, mean_and_range
from diffusion_core.tracking import STEP

DENSE = "dense/"
"""Prefix of the figures of a network before it is pruned."""
NETWORK = ("model.", "data.", "upsample.factor")
"""Beginnings of the settings that decide the cost of a dense network."""


@dataclass(frozen=True)
class Candidate:
    """Trials that differ in their seed only.

    Attributes:
        trials: those with a value of the metric, one for each seed, the best first.
        metric: the figure.
        repeated: number of trials that are left out, because a later one has the same settings and the same seed.
        stopped: number of trials that are left out, because early termination stopped them and others finished.
    """

    trials: Sequence[Trial]
    metric: str
    repeated: int = 0
    stopped: int = 0

    @cached_property
    def values(self) -> list[float]:
        """The metric of each trial."""
        return [trial.figures[self.metric] for trial in self.trials]

    @property
    def value(self) -> float:
        """Mean of the metric."""
        return fmean(self.values)

    @cached_property
    def interval(self) -> Interval | None:
        """Uncertainty of the mean; None if the trials do not tell.

        Equal values of several seeds do not tell how much they vary. Of a share, it is the wider one of Student's
        interval and of Wilson's interval of all images together.
        """
        if len(self.trials) == 1:
            return trial_interval(self.trials[0], self.metric)
        found = mean_interval(self.values) if len(set(self.values)) > 1 else None
        if self.metric not in SHARES:
            return found
        seeds = [] if found is None else [Interval(max(0.0, found.low), min(1.0, found.high), found.how)]
        return max([*seeds, *self._pooled()], key=lambda interval: interval.high - interval.low, default=None)

    def _pooled(self) -> list[Interval]:
        """Return Wilson's interval of the images of all trials together; empty if their number is unknown."""
        images = [trial.images(self.metric) for trial in self.trials]
        if not all(images) or not all(0.0 <= value <= 1.0 for value in self.values):
            return []
        return [wilson(self.value, sum(count or 0 for count in images))]

    @property
    def best(self) -> Trial:
        """The trial that stands for all."""
        return self.trials[0]

    def text(self) -> str:
        """Return value and uncertainty: ``0.93, 95% Wilson interval of 500 images 0.91 to 0.95``."""
        text = mean_and_range(self.values, ".4g")
        if len(self.trials) > 1:
            seeds = ", ".join(str(trial.seed) for trial in self.trials)
            text += f", mean and range of {len(self.trials)} seeds ({seeds})"
        if self.interval is not None:
            text += f", 95% {self.interval.how} {cell(self.interval.low)} to {cell(self.interval.high)}"
        if self.repeated:
            text += f", {self.repeated} more of the same seed not counted"
        if self.stopped:
            text += f", {self.stopped} more stopped early not counted"
        return text


def trial_interval(trial: Trial, figure: str) -> Interval | None:
    """Return the uncertainty of a figure of one trial: that of a share of images; None for all other figures."""
    value, images = trial.value(figure), trial.images(figure)
    if figure not in SHARES or value is None or not images or not 0.0 <= value <= 1.0:
        return None
    return wilson(value, images)


def candidates(study: Study) -> list[Candidate]:
    """Return the trials with a value of the metric, repeated seeds joined, best first.

    Trials that failed never count, and trials that are running count only if no other has ended. Trials that were
    stopped early count only if no other with their settings has finished: they were trained for a shorter time. Of
    trials with the same settings and the same seed, the last one counts: they are no independent repetitions.
    """
    metric = study.metric
    if metric is None or metric not in study.goals:
        return []
    measured = [trial for trial in study.trials if trial.judged(metric) is not None]
    ended = [trial for trial in measured if trial.state in ENDED] or measured
    groups: dict[str, list[Trial]] = {}
    for trial in ended:
        groups.setdefault(recipe(trial), []).append(trial)
    sign = 1.0 if study.goals[metric] == "minimize" else -1.0
    found = []
    for joined in groups.values():
        trials = [trial for trial in joined if trial.state == FINISHED] or joined
        # The best of the repetitions stands for them, so that the commands name the best checkpoint.
        counted = sorted({trial.seed: trial for trial in trials}.values(), key=lambda one: sign * one.figures[metric])
        found.append(Candidate(tuple(counted), metric, len(trials) - len(counted), len(joined) - len(trials)))
    return sorted(found, key=lambda candidate: sign * candidate.value)


def equal_to(winner: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that the measurements do not tell from the winner (see :mod:`intervals`).

    Without an interval of both, the two cannot be compared, whatever their values are.
    """
    return [other for other in others if other is not winner and _may_be_equal(winner, other)]


def _may_be_equal(one: Candidate, other: Candidate) -> bool:
    if one.interval is None or other.interval is None:
        return False
    return may_be_equal(one.value, one.interval, other.value, other.interval)


def front_of(study: Study, quality: str, cost: str) -> list[int]:
    """Return the indices of the trials on the Pareto front of a figure of quality against a cost, cheapest first."""
    points = []
    for trial in study.trials:
        good, dear = trial.judged(quality), trial.judged(cost)
        points.append(None if good is None or dear is None else (dear, good))
    return pareto_front(points, ["minimize", study.goals[quality]])


def front_of_objectives(study: Study) -> Front | None:
    """Return the Pareto front of a study's objectives; None if it has none, or no trial has all of them."""
    points = [point_of(judged(trial), study.objectives) for trial in study.trials]
    return front_among(points, study.objectives) if study.objectives and any(points) else None


@dataclass(frozen=True)
class Stage:
    """A network of a lineage before its last checkpoint: before pruning, or just after it."""

    label: str
    cost: float
    quality: float


def stages(study: Study, trial: Trial, quality: str, cost: str) -> list[Stage]:
    """Return the networks that a trial went through: dense, and pruned before fine-tuning.

    The cost of the dense network is that of a dense trial with the same settings of model and data. Without one, or
    for a cost that is measured instead of counted, its stage is left out.
    """
    own = trial.value(cost)
    dense = [row for row in trial.history if f"{DENSE}{quality}" in row]
    if own is None or not dense or cost not in COUNTED:
        return []
    found = []
    network = _network(trial)
    siblings = (other for other in study.trials if _is_dense(other) and _network(other) == network)
    before = next((value for other in siblings if (value := other.value(cost)) is not None), None)
    if before is not None:
        found.append(Stage("dense", before, dense[-1][f"{DENSE}{quality}"]))
    after = [row for row in trial.history if quality in row and row[STEP] > dense[-1][STEP]]
    if len(after) > 1 and after[0][STEP] != trial.step:
        found.append(Stage("pruned", own, after[0][quality]))
    return found


def _network(trial: Trial) -> list[tuple[str, str]]:
    return sorted((key, str(value)) for key, value in trial.settings.items() if key.startswith(NETWORK))


def _is_dense(trial: Trial) -> bool:
    return trial.settings.get("prune.method", "none") == "none" and trial.parent is None
