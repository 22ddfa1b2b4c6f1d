"""Search methods of Optuna, which learn from several objectives: multivariate TPE and NSGA-II.

Optuna keeps its study in a journal in the sweep's folder, a line for each change. The sweep's own state says which
trials there are: a trial that only the journal knows was suggested just before the sweep was killed, and is suggested
again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusion_core.config import ConfigError
from diffusion_core.messages import one_line
from diffusion_core.randomness import stream_seed
from diffusion_core.registries import SEARCHES
from diffusion_core.search.engine import SEARCH_SEED, plain, quantile
from diffusion_core.search.method import SearchMethod, SearchRequest
from diffusion_core.search.objectives import point_of
from diffusion_core.search.space import is_whole

JOURNAL = "optuna.journal"
"""File in the sweep's folder with Optuna's study."""
PLACE = "place"
"""Attribute of a trial in the study: its place among the trials of the sweep, from 0. It is written last."""
TAIL = 0.00135
"""Probability of each end of a normal distribution that is not searched: beyond three standard deviations."""

Sampler = Callable[[int, int | None], Any]
"""Returns a sampler of Optuna, given a seed and the number of trials."""


class OptunaSearch:
    """A search by a sampler of Optuna.

    A range is searched as the quantiles of its distribution, a list of increasing numbers by their places, and any
    other list as unordered values.

    Args:
        request: what to search. Without a folder, the study is in memory.
        sampler: makes the sampler. It is made anew for each suggestion, with a seed of its own.
    """

    def __init__(self, request: SearchRequest, sampler: Sampler) -> None:
        self.request = request
        self.sampler = sampler
        self.spaces = {key: spec for key, spec in sorted(request.config["parameters"].items()) if _varies(spec)}
        self._study: Any = None

    def suggest(self, past: Sequence[Mapping[str, Any]], runs: Callable[[], Sequence[Any]]) -> dict[str, Any] | None:
        """Return the parameters of the next trial, as :class:`~diffusion_core.search.method.Search` does.

        Raises:
            ConfigError: if the journal is damaged or cannot be written, or does not know the trials so far.
        """
        known = runs() if past else ()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That a sampler is experimental.
            try:
                return self._parameters(self._next(len(past), known))
            except ConfigError:
                raise
            except OSError as error:
                remedy = "free some space or make it writable, then repeat the command"
                raise ConfigError(f"{self._journal()!r}: {error.strerror}; {remedy}") from None
            except Exception as error:  # Whatever Optuna makes of a damaged file, the remedy is the same.
                raise self._damaged(f"is damaged ({one_line(error)})") from None

    def _next(self, place: int, runs: Sequence[Any]) -> Any:
        """Return the trial of the study at a place: one that was suggested before, or a new one."""
        import optuna

        study = self._study = self._study or self._open()
        known: dict[int, Any] = {}
        for trial in study.get_trials(deepcopy=False):
            if PLACE in trial.user_attrs:
                known[trial.user_attrs[PLACE]] = trial
            elif not trial.state.is_finished():  # Its suggestion was interrupted.
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if missing := set(range(place)) - known.keys():
            raise self._damaged(f"lacks {len(missing)} of the sweep's {place} trials")
        for index, run in enumerate(runs):
            if not known[index].state.is_finished():
                self._tell(known[index], run)
            elif known[index].state == optuna.trial.TrialState.FAIL:
                self._tell_again(known[index], run)
        if place in known:
            return known[place]
        study.sampler = self.sampler(stream_seed(SEARCH_SEED, place) & 0xFFFFFFFF, self.request.total)
        trial = study.ask({key: _distribution(spec) for key, spec in self.spaces.items()})
        trial.set_user_attr(PLACE, place)
        return trial

    def _tell(self, trial: Any, run: Any) -> None:
        """Tell the study what a trial measured, and by how much that exceeds the limits, unless it is under way."""
        import optuna

        if run.state == "running":
            return
        if (point := self._point(run)) is None:
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            return
        open_trial = optuna.trial.Trial(self._study, trial._trial_id)
        for name, excess in self._excesses(point).items():
            open_trial.set_constraint(name, excess)
        self._study.tell(trial.number, list(point))

    def _tell_again(self, trial: Any, run: Any) -> None:
        """Add what a trial that had failed measured when it was run again. It takes the place of the failed one."""
        import optuna

        if (point := self._point(run)) is not None:
            self._study.add_trial(
                optuna.create_trial(
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs=trial.user_attrs,
                    values=list(point),
                    constraints=self._excesses(point),
                )
            )

    def _point(self, run: Any) -> Sequence[float] | None:
        """Return the objectives of a trial; None if it has not finished, or lacks one."""
        return point_of(run.summary_metrics, self.request.objectives) if run.state == "finished" else None

    def _excesses(self, point: Sequence[float]) -> dict[str, float]:
        """Return by how much a trial exceeds each limit."""
        with_values = zip(self.request.objectives, point, strict=True)
        return {one.name: one.excess(value) for one, value in with_values if one.limit is not None}

    def _parameters(self, trial: Any) -> dict[str, Any]:
        """Return a trial of the study as parameters of a sweep."""
        specs = sorted(self.request.config["parameters"].items())
        return {key: _value(key, spec, trial.params[key]) if key in self.spaces else _only(spec) for key, spec in specs}

    def _open(self) -> Any:
        """Return the study, new or as the journal holds it."""
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage: Any = None
        if self.request.folder is not None:
            file = self.request.folder / JOURNAL
            drop_torn_line(file)
            lock: Any = _NoLock()
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
        goals = [objective.goal for objective in self.request.objectives]
        return optuna.create_study(storage=storage, study_name="sweep", directions=goals, load_if_exists=True)

    def _journal(self) -> str:
        return str((self.request.folder or Path()) / JOURNAL)

    def _damaged(self, reason: str) -> ConfigError:
        return ConfigError(f"{self._journal()!r}: {reason}; give this sweep another --name, or delete its folder")


class _NoLock:
    """Stands for the lock of a journal: this process holds that of the sweep. Optuna's own outlives a kill by 30 s."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def drop_torn_line(file: Path) -> None:
    """Cut off what follows the last line break of a file: a line that was being written when its process was killed.

    The next line would be appended to it, and no longer be readable.
    """
    if not file.is_file():
        return
    with file.open("rb+") as journal:
        content = journal.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            journal.truncate(whole)


def _varies(spec: Mapping[str, Any]) -> bool:
    return "value" not in spec and len(spec.get("values", (0, 1))) > 1


def _only(spec: Mapping[str, Any]) -> Any:
    """Return the value of a parameter that has only one."""
    return spec["value"] if "value" in spec else spec["values"][0]


def _distribution(spec: Mapping[str, Any]) -> Any:
    """Return what Optuna chooses for a parameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if "values" in spec:
        values = spec["values"]
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        ordered = numbers and all(a < b for a, b in pairwise(values))
        return IntDistribution(0, len(values) - 1) if ordered else CategoricalDistribution(range(len(values)))
    if is_whole(spec):
        return IntDistribution(spec["min"], spec["max"])
    tail = TAIL if "normal" in spec.get("distribution", "") else 0.0
    return FloatDistribution(tail, 1.0 - tail)


def _value(key: str, spec: Mapping[str, Any], chosen: Any) -> Any:
    """Return the value of a parameter that stands for what Optuna chose."""
    if "values" in spec:
        return plain(spec["values"][chosen])
    return chosen if is_whole(spec) else quantile(key, spec, chosen)


def tpe(seed: int, total: int | None) -> Any:
    """Return Optuna's multivariate TPE, which draws the first third of the trials, at most ten, at random."""
    from optuna.samplers import TPESampler

    first = 10 if total is None else max(4, min(10, total // 3))
    return TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=first)


def nsga2(seed: int, total: int | None) -> Any:
    """Return Optuna's NSGA-II with a population that leaves a sweep several generations."""
    from optuna.samplers import NSGAIISampler

    population = 50 if total is None else max(6, min(50, math.isqrt(total) + total // 10))
    return NSGAIISampler(seed=seed, population_size=population)


SEARCHES["tpe"] = SearchMethod(
    lambda request: OptunaSearch(request, tpe),
    "multivariate tree of Parzen estimators, one or several objectives (Bergstra et al. 2011; Ozaki et al. 2022)",
    learns=True,
    several=True,
    package="optuna",
)
SEARCHES["nsga2"] = SearchMethod(
    lambda request: OptunaSearch(request, nsga2),
    "genetic algorithm NSGA-II, one or several objectives (Deb et al. 2002)",
    learns=True,
    several=True,
    package="optuna",
)
