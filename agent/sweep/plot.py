"""Plot the results of a sweep: the metric by trial, and against each parameter that varied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.sweep.file import SweepFile
from agent.sweep.results import TrialRecord
from diffusion_core.config.metrics import is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FILE = "results.png"
COLUMNS = 3
MAX_PARAMETERS = 8
"""Greatest number of parameters with a panel; with the panel of trials, they fill three rows."""
MAX_LABEL = 14
"""Greatest number of characters of a value on an axis."""
COLOURS = {"finished": "tab:blue", "stopped": "tab:orange", "failed": "tab:red"}


def plot_results(path: Path, sweep: SweepFile, trials: Sequence[TrialRecord]) -> None:
    """Plot the trials that have a finite value of the sweep's metric; write no file if there are none.

    Args:
        path: the PNG file to write.
        trials: in the order of their creation.
    """
    metric = sweep.metric
    if metric is None:
        return
    numbers = [
        number
        for number, trial in enumerate(trials, start=1)
        if metric in trial.figures and math.isfinite(trial.figures[metric])
    ]
    measured = [trials[number - 1] for number in numbers]
    if not measured:
        return
    from matplotlib.figure import Figure  # Slow to import.

    plotted_keys = sweep.varied[:MAX_PARAMETERS]
    columns = min(COLUMNS, 1 + len(plotted_keys))
    rows = math.ceil((1 + len(plotted_keys)) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    values = [trial.figures[metric] for trial in measured]
    _by_trial(axes[0], numbers, measured, values, metric)
    for panel, key in zip(axes[1:], plotted_keys, strict=False):
        _by_parameter(panel, measured, values, key, sweep.parameters[key])
    for panel in axes[: 1 + len(plotted_keys)]:
        panel.set_ylabel(metric)
        panel.grid(alpha=0.3)
        if min(values) > 0 and max(values) > 20 * min(values):
            panel.set_yscale("log")
    for panel in axes[1 + len(plotted_keys) :]:
        panel.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"{sweep.name}: {len(measured)} trials")
    figure.savefig(path, dpi=110)


def _by_trial(
    panel: Axes, numbers: Sequence[int], trials: Sequence[TrialRecord], values: Sequence[float], metric: str
) -> None:
    """Plot the metric in the order of the trials, coloured by their state, and the best so far."""
    from matplotlib.ticker import MaxNLocator

    for state in dict.fromkeys(trial.state for trial in trials):
        points = [(x, y) for x, y, trial in zip(numbers, values, trials, strict=True) if trial.state == state]
        panel.plot(*zip(*points, strict=True), "o", color=_colour(state), label=state)
    best: list[float] = []
    for value in values:
        best.append(value if not best or is_better(metric, value, best[-1]) else best[-1])
    panel.step(numbers, best, where="post", color="black", linewidth=1, label="best so far")
    panel.set_xlabel("trial")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _by_parameter(
    panel: Axes, trials: Sequence[TrialRecord], values: Sequence[float], key: str, spec: dict[str, Any]
) -> None:
    """Plot the metric against a parameter: on its scale if it is a range, else in one column per value."""
    x_values: list[Any] = [trial.parameters.get(key) for trial in trials]
    if "values" in spec:
        values_of_key = spec["values"]
        panel.set_xticks(
            range(len(values_of_key)), map(_label, values_of_key), rotation=30 if len(values_of_key) > 3 else 0
        )
        panel.set_xlim(-0.5, len(values_of_key) - 0.5)
        x_values = [values_of_key.index(value) for value in x_values]
    elif "log" in spec.get("distribution", ""):
        panel.set_xscale("log")
    panel.set_xlabel(key)
    panel.scatter(x_values, values, c=[_colour(trial.state) for trial in trials], alpha=0.8)


def _colour(state: str) -> str:
    return COLOURS.get(state, "tab:gray")


def _label(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"
