"""The style of plots: colours that the colour-blind tell apart, ticks that do not overprint, points in their places."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import scaling
from benchmarks.scaling import Point
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from skimage.color import deltaE_ciede2000, rgb2lab
from studies import table

from diffusion_core.report import markdown, plots
from diffusion_core.report.findings import front_of
from diffusion_core.report.plots import COLOURS, MARKERS, colour, log_ticks, marker, panels
from diffusion_core.report.study import Study

CONES = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
"""From linear RGB to the cones' responses L, M, S (Vienot, Brettel & Mollon 1999, "Digital video colourmaps")."""
BLIND = {
    "none": np.eye(3),
    "protan": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
    "deutan": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
}
"""What is left of the responses without one kind of cone (the same paper)."""
TOLD_APART = 10.0
"""CIEDE2000 difference of two colours; 2.3 is called just noticeable (Mahy et al. 1994)."""


def seen(text: str, kind: str) -> np.ndarray[Any, Any]:
    """A colour, ``#rrggbb``, as an eye without one kind of cone sees it, in CIELAB."""
    encoded = np.array([int(text[place : place + 2], 16) for place in (1, 3, 5)]) / 255.0
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    changed = np.clip(np.linalg.inv(CONES) @ BLIND[kind] @ CONES @ linear, 0.0, 1.0)
    back = np.where(changed <= 0.0031308, 12.92 * changed, 1.055 * changed ** (1 / 2.4) - 0.055)
    lab: np.ndarray[Any, Any] = rgb2lab(back[None, None])[0, 0]
    return lab


@pytest.mark.parametrize("kind", BLIND)
def test_colours_are_told_apart(kind: str) -> None:
    for one, other in itertools.combinations(COLOURS, 2):
        assert deltaE_ciede2000(seen(one, kind), seen(other, kind)) > TOLD_APART, (one, other)


def test_the_check_finds_colours_that_are_not() -> None:
    """Of matplotlib's default cycle, which the plots had before."""
    blue, green, red, purple = "#1f77b4", "#2ca02c", "#d62728", "#9467bd"
    assert deltaE_ciede2000(seen(red, "none"), seen(green, "none")) > 50
    assert deltaE_ciede2000(seen(red, "deutan"), seen(green, "deutan")) < TOLD_APART
    assert deltaE_ciede2000(seen(blue, "protan"), seen(purple, "protan")) < TOLD_APART


def test_series_differ_in_colour_and_marker() -> None:
    pairs = {(colour(index), marker(index)) for index in range(len(COLOURS) * len(MARKERS))}
    assert len(pairs) == 56


def boxes(panel: Axes, axis: str) -> list[Any]:
    """Where the labels of an axis are drawn."""
    figure = panel.figure
    assert isinstance(figure, Figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    along = panel.xaxis if axis == "x" else panel.yaxis
    low, high = sorted(along.get_view_interval())
    ticks = [*along.get_major_ticks(), *along.get_minor_ticks()]
    shown = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]
    return [label.get_window_extent(canvas.get_renderer()) for label in shown]


@pytest.mark.parametrize("values", [(0.108, 1.21), (0.185, 2.8), (0.573, 4.47), (3.0, 4.0), (1e-3, 1e3)])
def test_ticks_do_not_overprint(values: tuple[float, float]) -> None:
    _, (panel,) = panels(3.6, 3.4)
    panel.plot([1, 2], values)
    log_ticks(panel, "y")
    found = boxes(panel, "y")
    assert found or values == (3.0, 4.0)
    assert not [True for one, other in itertools.combinations(found, 2) if one.overlaps(other)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that are saved, while they are saved."""
    found: list[Figure] = []
    real = plots.save

    def save(figure: Figure, path: Path) -> Path:
        found.append(figure)
        return real(figure, path)

    for module in (markdown, table, scaling):
        monkeypatch.setattr(module, "save", save)
    return found


def test_scaling_has_a_panel_an_axis_whose_labels_do_not_overprint(drawn: list[Figure], tmp_path: Path) -> None:
    width = [
        Point("width", value, seconds, float(value**2)) for value, seconds in ((32, 0.185), (64, 0.394), (128, 1.13))
    ]
    scaling.plot({"width": width, "batch": [replace(point, axis="batch") for point in width]}, tmp_path / "s.png")
    (figure,) = drawn
    for panel in figure.axes:
        for axis in "xy":
            found = boxes(panel, axis)
            assert found
            assert not [True for one, other in itertools.combinations(found, 2) if one.overlaps(other)]


def points(panel: Axes) -> set[tuple[float, float]]:
    """The points of a panel that have a marker."""
    lines = [line for line in panel.lines if line.get_marker() not in ("None", "", None, "|", "_")]
    found = [np.asarray(line.get_xydata(), dtype=float) for line in lines]
    return {(x, y) for places in found for x, y in places.tolist()}


def test_methods_of_equal_cost_are_apart_without_moving_a_value(drawn: list[Figure], tmp_path: Path) -> None:
    measured = {
        "dense": [(16.0, [0.99])],
        "l1": [(8.0, [0.8, 0.9]), (4.0, [0.5])],
        "l2": [(8.0, [0.8, 0.9]), (4.0, [0.6])],
    }
    table.plot(tmp_path / "p.png", measured, "million MACs", "agreement", "dense")
    (panel,) = drawn[0].axes
    found = {(round(x, 9), y) for x, y in points(panel)}
    assert found == {(0.85, 0.0), (0.85, 1.0), (0.5, 0.0), (0.6, 1.0)}
    assert [label.get_text() for label in panel.get_yticklabels()] == ["l1", "l2"]
    (legend,) = drawn[0].legends
    words = {text.get_text() for text in legend.get_texts()}
    assert words == {"dense: 16 million MACs", "8 million MACs", "4 million MACs"}


def test_the_front_shows_each_trial_at_its_cost(
    study_of: Callable[..., Study], drawn: list[Figure], tmp_path: Path
) -> None:
    study = study_of(30)
    cost = study.first_cost()
    assert cost == "model/macs"
    assert markdown.plot_front(study, tmp_path / "front.png")
    (panel,) = drawn[0].axes
    metric = str(study.metric)
    wanted = {(t.figures[cost], t.figures[metric]) for t in study.trials if t.value(metric) is not None}
    assert points(panel) == wanted
    legend = panel.get_legend()
    assert legend is not None
    assert {"schedule linear", "schedule cosine", "Pareto front"} == {text.get_text() for text in legend.get_texts()}
    front = front_of(study, metric, cost)
    assert len(panel.texts) == min(len(front), markdown.MOST_NAMED)
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    for label in panel.texts:
        assert label.get_window_extent(renderer).x1 <= panel.get_window_extent(renderer).x1 + 1, label.get_text()


def test_trials_that_failed_are_drawn_without_a_front(
    study_of: Callable[..., Study], drawn: list[Figure], tmp_path: Path
) -> None:
    study = study_of(30)
    measured = [replace(trial, state="failed") for trial in study.trials if trial.value(str(study.metric)) is not None]
    markdown.write_markdown(replace(study, trials=measured), tmp_path / "failed.md")
    (panel,) = drawn[0].axes
    assert points(panel) == {(trial.figures["model/macs"], trial.figures[str(study.metric)]) for trial in measured}
    legend = panel.get_legend()
    assert legend is not None
    assert {"schedule linear", "schedule cosine"} == {text.get_text() for text in legend.get_texts()}


def test_the_first_cost_tells_trials_apart(study_of: Callable[..., Study]) -> None:
    study = study_of(4)
    same = [replace(trial, figures={**trial.figures, "model/macs": 5.0, "model/params": 7.0}) for trial in study.trials]
    assert replace(study, trials=same).first_cost() == "seconds"
    masked = [replace(trial, figures={**trial.figures, "model/nonzero_macs": trial.figures["model/macs"]})
              for trial in study.trials]  # fmt: skip
    assert replace(study, trials=masked).first_cost() == "model/macs"  # No masks: they are the same.
    masked[0] = replace(masked[0], figures={**masked[0].figures, "model/nonzero_macs": 1.0})
    assert replace(study, trials=masked).first_cost() == "model/nonzero_macs"
    one = replace(study, trials=same[:1])
    assert one.first_cost() == "model/macs"  # Nothing tells one trial apart: the first cost that it has.
    assert replace(study, trials=[]).first_cost() is None
