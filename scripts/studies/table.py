"""Tables and plots of the comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion_core.files import write_text


def write_table(file: Path, lines: Sequence[str]) -> None:
    """Write a Markdown file, and print it."""
    text = "\n".join(lines) + "\n"
    write_text(file, text)
    print(text)


def plot(file: Path, points: Mapping[str, Sequence[tuple[float, Sequence[float]]]], x: str, y: str) -> None:
    """Plot quality against cost: mean and range over the seeds, one colour per method, side by side at each cost.

    Args:
        file: the image to write.
        points: costs and qualities, by method.
        x: label of the costs.
        y: label of the qualities.
    """
    from matplotlib.figure import Figure  # Slow to import; without pyplot, it needs no display.

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    costs = [cost for places in points.values() for cost, _ in places]
    apart = 0.006 * (max(costs) - min(costs)) or 0.01
    for index, (name, places) in enumerate(points.items()):
        means = [sum(values) / len(values) for _, values in places]
        ranges = [(mean - min(values), max(values) - mean) for mean, (_, values) in zip(means, places, strict=True)]
        shifted = [cost + (index - (len(points) - 1) / 2.0) * apart for cost, _ in places]
        axes.errorbar(shifted, means, list(zip(*ranges, strict=True)), fmt="o", markersize=4, capsize=2, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(file, dpi=120)
