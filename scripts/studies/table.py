"""Tables and plots of the comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion_core.files import write_text
from diffusion_core.report.plots import BLACK, colour, marker, panels, plain, save


def write_table(file: Path, lines: Sequence[str]) -> None:
    """Write a Markdown file, and print it."""
    text = "\n".join(lines) + "\n"
    write_text(file, text)
    print(text)


def plot(
    file: Path,
    points: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    cost: str,
    quality: str,
    reference: str,
) -> None:
    """Plot quality by method, in one row each: mean and range over the seeds, one colour and marker per cost.

    Methods with equal costs would hide each other on an axis of costs.

    Args:
        file: the image to write.
        points: costs and qualities, by method; the costs of all methods in the same order.
        cost: unit of the costs.
        quality: label of the qualities.
        reference: the method that has no row, but a vertical line at its mean: the dense network.
    """
    rows = {name: places for name, places in points.items() if name != reference}
    levels = len(next(iter(rows.values())))
    figure, (axes,) = panels(7.5, 1.2 + 0.32 * len(rows))
    for index in range(levels):
        costs = [places[index][0] for places in rows.values()]
        means = [sum(places[index][1]) / len(places[index][1]) for places in rows.values()]
        # The mean of equal numbers may differ from them by rounding.
        below = [max(0.0, mean - min(places[index][1])) for mean, places in zip(means, rows.values(), strict=True)]
        above = [max(0.0, max(places[index][1]) - mean) for mean, places in zip(means, rows.values(), strict=True)]
        low, high = f"{min(costs):.3g}", f"{max(costs):.3g}"
        label = f"{low} {cost}" if low == high else f"{low} to {high} {cost}"
        axes.errorbar(means, list(range(len(rows))), xerr=[below, above], fmt=marker(index), color=colour(index),
                      markersize=6, capsize=3, linewidth=1.2, label=plain(label))  # fmt: skip
    where, values = points[reference][0]
    label = plain(f"{reference}: {where:.3g} {cost}")
    axes.axvline(sum(values) / len(values), color=BLACK, linestyle=":", label=label)
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    axes.invert_yaxis()
    axes.set_xlabel(plain(quality))
    figure.legend(loc="outside lower center", ncols=levels + 1, frameon=False)
    save(figure, file)
