"""What a page shows: the rows of its table, and the data of its plots, as plain JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_core.config.ranking import trial_order
from diffusion_core.report.findings import front_of, front_of_objectives, stages, trial_interval
from diffusion_core.report.pictures import animation_uri, grid_uri
from diffusion_core.report.study import COSTS, Study, Trial
from diffusion_core.tables import cell
from diffusion_core.tracking import STEP

SHOWN_SETTINGS = 6
"""Varied settings whose columns are shown at first."""
SHOWN_COSTS = ("model/nonzero_macs", "model/params", "seconds")
MOST_CURVES = 6
"""Figures with learning curves."""
MOST_POINTS = 40_000
"""Points of all learning curves together; of longer ones, evenly spaced rows are kept."""
FEWEST_PER_CURVE, MOST_PER_CURVE = 20, 200
MOST_PICTURE_BYTES = 6_000_000
"""Bytes of all grids in a page; the best trials come first."""
MOST_ANIMATIONS = 4


@dataclass(frozen=True)
class Column:
    """A column of the table of trials.

    Attributes:
        key: the setting or figure.
        kind: ``setting`` or ``figure``.
        shown: whether it is shown at first.
    """

    key: str
    kind: str
    shown: bool

    def value(self, trial: Trial) -> Any:
        """Return a trial's value in this column, or None."""
        return trial.settings.get(self.key) if self.kind == "setting" else trial.figures.get(self.key)


def columns_of(study: Study) -> list[Column]:
    """Return the columns of the table: the metric, varied settings, other figures of quality, and costs."""
    qualities = study.qualities()
    first = [Column(name, "figure", True) for name in qualities[:1]]
    settings = [Column(key, "setting", place < SHOWN_SETTINGS) for place, key in enumerate(study.varied)]
    most = [
        name for name in qualities[1:] if 2 * sum(name in trial.figures for trial in study.trials) >= len(study.trials)
    ]
    others = [Column(name, "figure", name in most[:2]) for name in qualities[1:]]
    wanted = {*SHOWN_COSTS, *(each.name for each in study.objectives)}
    costs = [Column(name, "figure", name in wanted) for name in study.costs()]
    return [*first, *settings, *others, *costs]


def front_table(study: Study) -> tuple[list[str], list[list[str]]] | None:
    """Return names and cells of a table of the trials on the Pareto front of several objectives, or None."""
    front = front_of_objectives(study)
    if front is None:
        return None
    columns = [Column(each.name, "figure", True) for each in study.objectives]
    columns += [Column(key, "setting", True) for key in study.varied[:SHOWN_SETTINGS]]
    trials = [study.trials[index] for index in front.trials]
    rows = [[trial.name, *(text_of(column.value(trial)) for column in columns)] for trial in trials]
    return ["trial", *(column.key for column in columns)], rows


def ranking(study: Study) -> list[int]:
    """Return the indices of the trials by the metric, best first, in the order of :func:`trial_order`."""
    maximize = study.goals.get(study.metric or "") == "maximize"
    order = [trial_order(trial, study.metric, maximize=maximize) for trial in study.trials]
    return sorted(range(len(order)), key=order.__getitem__)


def text_of(value: Any) -> str:
    """Return a setting or a figure as the text of a cell."""
    return cell(list(value) if isinstance(value, tuple) else value)


def exact(value: Any) -> str:
    """Return a setting in full, as a command line takes it: ``0.00032661``, ``[1, 2]``, ``null``."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def plot_data(study: Study, order: Sequence[int]) -> dict[str, Any]:
    """Return the data of the page's plots as JSON without NaN.

    Args:
        study: the study.
        order: indices of its trials, the best first.
    """
    qualities, costs = study.qualities(), study.costs()
    common = _common(study.trials)
    pictures, animations = _pictures(study, order)
    trials = [
        {
            "name": trial.name,
            "state": trial.state,
            "step": trial.step,
            "settings": {key: exact(value) for key, value in trial.settings.items() if key not in common},
            "figures": {key: _number(value) for key, value in trial.figures.items()},
            "parent": trial.parent,
            "links": trial.links,
            "sample": trial.sample,
            "reproduce": trial.reproduce,
            "intervals": _intervals(trial, qualities),
            "curves": curves,
        }
        for trial, curves in zip(study.trials, _curves(study), strict=True)
    ]
    data = {
        "metric": study.metric,
        "kind": study.kind,
        "goals": dict(study.goals),
        "costs": {key: COSTS[key] for key in costs},
        "cost": study.first_cost(),
        "qualities": qualities,
        "objectives": [each.name for each in study.objectives],
        "varied": list(study.varied),
        "numeric": [key for key in study.varied if _is_number(trial.settings.get(key) for trial in study.trials)],
        "common": {key: exact(value) for key, value in common.items()},
        "order": list(order),
        "trials": trials,
        "fronts": {f"{quality}|{cost}": front_of(study, quality, cost) for quality in qualities for cost in costs},
        "stages": {f"{quality}|{cost}": _stages(study, quality, cost) for quality in qualities for cost in costs},
    }
    return {**data, "pictures": pictures, "animations": animations}


def _stages(study: Study, quality: str, cost: str) -> dict[str, list[list[Any]]]:
    """Return the earlier networks of trials, by the index of the trial: label, cost and quality of each."""
    found = {index: stages(study, trial, quality, cost) for index, trial in enumerate(study.trials)}
    return {
        str(index): [[stage.label, _number(stage.cost), _number(stage.quality)] for stage in before]
        for index, before in found.items()
        if before
    }


def _intervals(trial: Trial, qualities: Sequence[str]) -> dict[str, list[float]]:
    found = {name: trial_interval(trial, name) for name in qualities}
    return {name: [interval.low, interval.high] for name, interval in found.items() if interval is not None}


def _common(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the settings that all trials have in common."""
    if len(trials) < 2:
        return {}
    first, *others = trials
    return {
        key: value
        for key, value in first.settings.items()
        if all(key in other.settings and other.settings[key] == value for other in others)
    }


def curve_names(study: Study) -> list[str]:
    """Return the figures that have learning curves: the metric, other figures of quality, and the training loss."""
    logged = dict.fromkeys(name for trial in study.trials for row in trial.history for name in row)
    wanted = [study.metric, *(name for name in logged if name in study.goals), "train/loss"]
    return [name for name in dict.fromkeys(wanted) if name in logged][:MOST_CURVES]


def _curves(study: Study) -> list[dict[str, list[list[float | None]]]]:
    """Return the learning curves of each trial: steps and values by figure, thinned."""
    names = curve_names(study)
    each = MOST_POINTS // max(1, len(names) * len(study.trials))
    most = min(MOST_PER_CURVE, max(FEWEST_PER_CURVE, each))
    found = []
    for trial in study.trials:
        curves: dict[str, list[list[float | None]]] = {}
        for name in names:
            rows = _thinned([(row[STEP], row[name]) for row in trial.history if name in row], most)
            if rows:
                curves[name] = [[step for step, _ in rows], [_number(value) for _, value in rows]]
        found.append(curves)
    return found


def _thinned(rows: Sequence[tuple[float, float]], most: int) -> Sequence[tuple[float, float]]:
    """Return at most ``most`` rows, evenly spaced, with the first and the last one."""
    if len(rows) <= most:
        return rows
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def _pictures(study: Study, order: Sequence[int]) -> tuple[dict[str, str], dict[str, str]]:
    """Return grids and animations as data URIs, by the index of their trial."""
    grids: dict[str, str] = {}
    animations: dict[str, str] = {}
    left = MOST_PICTURE_BYTES
    for index in order:
        files: Mapping[str, Any] = study.trials[index].pictures
        if left > 0 and "samples" in files and (uri := grid_uri(files["samples"])):
            grids[str(index)] = uri
            left -= len(uri)
        if len(animations) < MOST_ANIMATIONS and "diffusion" in files and (uri := animation_uri(files["diffusion"])):
            animations[str(index)] = uri
    return grids, animations


def _is_number(values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _number(value: Any) -> float | None:
    """Return a number in six digits; None for NaN and infinity, which JSON lacks."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def script_json(data: Any) -> str:
    """Return JSON that is safe inside a script element: no tag, comment or line separator can begin in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), default=str)
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
