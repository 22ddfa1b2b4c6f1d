"""Which settings decide the metric: importances of a random forest, as in W&B's panel, and rank correlations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_core.report.study import CHAIN, SEED, Study, Trial

FEWEST = 5
"""Fewest trials that a forest is trained on."""
PER_SETTING = 10
"""Trials per setting below which a warning is given."""
TREES = 100
MOST_TRIALS = 5000


@dataclass(frozen=True)
class Importance:
    """The importance of a setting.

    Attributes:
        setting: its dotted key.
        share: its share of the reduction of variance in the forest; the shares of all settings sum to 1.
        correlation: Spearman's rank correlation with the metric, in [-1, 1]; None for a setting that is no number.
    """

    setting: str
    share: float
    correlation: float | None


@dataclass(frozen=True)
class Importances:
    """All importances, the largest first.

    Attributes:
        settings: one entry per setting that varied.
        explained: R^2 of the forest on trials that its trees were not trained on; near or below 0, it has learned
            nothing and its importances mean nothing.
        trials: number of trials.
        warning: why they are of little value; empty if they are not.
    """

    settings: Sequence[Importance]
    explained: float
    trials: int
    warning: str


def importances(study: Study) -> Importances | None:
    """Return the importance of each varied setting for the study's metric; None if there is too little to learn from.

    A random forest (Breiman 2001) of ``TREES`` trees with a fixed seed predicts the metric. Numbers are used as they
    are, all other values as indicators; the importances of the indicators of a setting are added.
    """
    if study.metric is None or study.kind == CHAIN:  # Each round of a chain differs from the one before in one way.
        return None
    trials = [trial for trial in study.trials if trial.value(study.metric) is not None][:MOST_TRIALS]
    settings = [key for key in study.varied if len({_text(trial.settings.get(key)) for trial in trials}) > 1]
    values = [float(trial.figures[study.metric]) for trial in trials]
    if len(trials) < FEWEST or not settings or len(set(values)) < 2:
        return None
    import warnings

    import numpy as np
    from scipy.stats import spearmanr  # Slow to import, as is sklearn.
    from sklearn.ensemble import RandomForestRegressor

    columns, owners = [], []
    for key in settings:
        for column in _columns(trials, key):
            columns.append(column)
            owners.append(key)
    forest = RandomForestRegressor(TREES, random_state=0, oob_score=True, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A trial that all trees have seen, where there are few.
        forest.fit(np.array(columns).T, values)
    explained = float(forest.oob_score_)
    shares = dict.fromkeys(settings, 0.0)
    for owner, share in zip(owners, forest.feature_importances_, strict=True):
        shares[owner] += float(share)
    found = []
    for key in settings:
        correlation = None
        if _is_numeric(trials, key):
            correlation = float(spearmanr(_columns(trials, key)[0], values).statistic)
        found.append(Importance(key, shares[key], correlation))
    return Importances(
        sorted(found, key=lambda item: -item.share), explained, len(trials), _warning(len(trials), settings, explained)
    )


def _warning(trials: int, settings: Sequence[str], explained: float) -> str:
    searched = len([key for key in settings if key != SEED])
    if trials < PER_SETTING * max(1, searched):
        return f"only {trials} trials for {searched} settings: expect other importances from other trials"
    if explained < 0.1:
        return "the forest does not predict the metric of trials that it has not seen: its importances mean little"
    return ""


def _is_numeric(trials: Sequence[Trial], key: str) -> bool:
    return all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for value in (trial.settings.get(key) for trial in trials)
    )


def _columns(trials: Sequence[Trial], key: str) -> list[list[float]]:
    """Return a setting as columns of numbers."""
    values = [trial.settings.get(key) for trial in trials]
    if _is_numeric(trials, key):
        return [[float(value) for value in values if value is not None]]
    kinds = list(dict.fromkeys(map(_text, values)))
    return [[float(_text(value) == kind) for value in values] for kind in kinds]


def _text(value: Any) -> str:
    return json.dumps(value, default=str)
