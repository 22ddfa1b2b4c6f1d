"""The style of all plots: one place for colours, markers and sizes.

Series differ in colour and in marker. The colours are those of Okabe & Ito (2008), "Color Universal Design", which
people with any common colour blindness can tell apart; their yellow is left out because it is faint on white.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_core.files import replaced_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
BLACK, GREY = "#000000", "#767676"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK)
MARKERS = "osD^vP*X"
DPI = 120


def colour(index: int) -> str:
    """Return the colour of a series, by its number from 0."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """Return the marker of a series, by its number from 0. Colour and marker together repeat after 56 series."""
    return MARKERS[index % len(MARKERS)]


def panels(width: float, height: float, count: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels side by side.

    Args:
        width: width of the figure in inches.
        height: its height in inches.
        count: number of panels.
    """
    from matplotlib.figure import Figure  # Slow to import. Without pyplot, it needs no display and has no global state.

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False).flatten())
    for panel in axes:
        panel.grid(color=GREY, alpha=0.25, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plain(text: str) -> str:
    """Return a text for a plot. Matplotlib reads text between dollar signs as mathematics, so they are escaped."""
    return text.replace("$", r"\$")


def counts(panel: Axes) -> None:
    """Label the x axis with prefixes of thousands, ``8 M``, instead of powers of ten."""
    from matplotlib.ticker import EngFormatter

    panel.xaxis.set_major_formatter(EngFormatter())


def log_ticks(panel: Axes, axis: str) -> None:
    """Make an axis logarithmic, with ticks that do not overprint each other: 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    set_scale, along = (panel.set_xscale, panel.xaxis) if axis == "x" else (panel.set_yscale, panel.yaxis)
    set_scale("log")
    along.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    along.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    along.set_minor_locator(NullLocator())


def make_room(figure: Figure, panel: Axes, labels: Sequence[Annotation]) -> None:
    """Extend a linear x axis to the right until labels beside points end within the panel, but at most to its double.

    Args:
        figure: the figure, complete otherwise.
        panel: its panel.
        labels: annotations at data coordinates.
    """
    figure.draw_without_rendering()  # Lays it out, so that sizes are known.
    left, right = panel.get_xlim()
    for label in labels:
        point = panel.transData.transform(label.xy)[0]
        beside = (label.get_window_extent().x1 - point) / panel.bbox.width
        right = max(right, left + (label.xy[0] - left) / (1.0 - min(0.5, beside)))
    panel.set_xlim(left, right)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, and return its file."""
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
    return path
