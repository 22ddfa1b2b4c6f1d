"""Render a study as Markdown with PNG pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from diffusion_core.files import replaced_file, write_text
from diffusion_core.report.contents import columns_of, ranking, text_of
from diffusion_core.report.findings import candidates, equal_to, front_of, trial_interval
from diffusion_core.report.importance import importances
from diffusion_core.report.pictures import shrunk
from diffusion_core.report.study import COSTS, Study
from diffusion_core.report.words import headline, notes
from diffusion_core.tables import markdown_table

MOST_ROWS = 50
"""Trials in the table; the best come first."""
PICTURES = 3
"""Trials whose grids are written."""
COLOUR, FRONT_COLOUR = "#0072b2", "#d55e00"


def write_markdown(study: Study, path: Path) -> None:
    """Write a study as Markdown. Pictures are beside it: ``NAME-front.png`` and ``NAME-samples-1.png`` and so on."""
    study = study.without_secrets()
    ranked = candidates(study)
    winner = ranked[0] if ranked else None
    equal = equal_to(winner, ranked) if winner else []
    order = ranking(study)
    states = ", ".join(f"{count} {state}" for state, count in study.states().items())
    lines = [
        f"# {escaped(study.title)}",
        "",
        escaped(f"{study.method or 'runs'}: {len(study.trials)} trials, {states}"),
        "",
    ]
    if study.searched:
        lines += [f"- {escaped(key)}: {escaped(words)}" for key, words in study.searched.items()] + [""]
    lines += [f"**{escaped(headline(study, winner))}**", ""]
    lines += [line for note in notes(study, winner, ranked, equal) for line in (escaped(note), "")]
    if winner is not None:
        commands = [text for text in (winner.best.reproduce, winner.best.sample) if text]
        # A fence longer than any in the commands cannot be closed by them.
        lines += ["````sh", *(text.replace("`", "'") for text in commands), "````", ""] if commands else []
    if equal:
        lines += ["Not told apart from it:", ""]
        lines += [f"- {escaped(f'{other.best.name}: {other.text()}')}" for other in equal] + [""]
    if plot_front(study, named(path, "front")):
        lines += [f"![quality against cost]({named(path, 'front').name})", ""]
    lines += ["## Trials", "", *_table(study, order), ""]
    if found := importances(study):
        lines += ["## Which settings matter", "", *([f"{found.warning}.", ""] if found.warning else [])]
        rows = [[escaped(item.setting), f"{item.share:.0%}"] for item in found.settings]
        lines += [*markdown_table(["setting", "importance"], rows), ""]
    lines += _pictures(study, order, path)
    protocols = sorted({(name, line) for trial in study.trials for name, line in trial.protocols.items()})
    if protocols:
        lines += ["## How figures were measured", ""]
        lines += [f"- {escaped(name)}: {escaped(line)}" for name, line in protocols] + [""]
    write_text(path, "\n".join(lines))


def named(path: Path, what: str) -> Path:
    """Return the file of a picture beside a report. Its name has no characters that a link would need escaped."""
    return path.with_name(f"{re.sub(r'[^A-Za-z0-9_-]+', '-', path.stem)}-{what}.png")


def escaped(text: str) -> str:
    """Return a text in one line in which nothing is markup."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>#!~&])", r"\\\1", line)


def _table(study: Study, order: Sequence[int]) -> list[str]:
    columns = [column for column in columns_of(study) if column.shown]
    rows = []
    for index in order[:MOST_ROWS]:
        trial = study.trials[index]
        rows.append([escaped(text) for text in (trial.name, trial.state, *(text_of(c.value(trial)) for c in columns))])
    lines = markdown_table(["trial", "state", *(escaped(column.key) for column in columns)], rows)
    left = len(order) - MOST_ROWS
    return [*lines, *(["", f"{left} more trials are not listed."] if left > 0 else [])]


def _pictures(study: Study, order: Sequence[int], path: Path) -> list[str]:
    lines: list[str] = []
    for index in order:
        grid = study.trials[index].pictures.get("samples")
        if grid is None or len(lines) == 3 * PICTURES:
            continue
        file = named(path, f"samples-{len(lines) // 3 + 1}")
        try:
            image = shrunk(grid)
        except (OSError, ValueError, SyntaxError):
            continue
        with replaced_file(file) as temporary:
            image.save(temporary, "png")
        lines += [escaped(study.trials[index].name), f"![samples]({file.name})", ""]
    return ["## Samples", "", *lines] if lines else []


def plot_front(study: Study, path: Path) -> bool:
    """Plot the metric against the first cost that is known, with the Pareto front.

    Return False and write nothing if the metric has no goal, or no trial has both figures.
    """
    from matplotlib.figure import Figure  # Slow to import; without pyplot, it needs no display.

    metric, cost = study.metric or "", next(iter(study.costs()), "")
    if metric not in study.goals:
        return False
    known = [t for t in study.trials if t.value(metric) is not None and t.value(cost) is not None]
    if not known:
        return False
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for trial in known:
        interval, value = trial_interval(trial, metric), trial.figures[metric]
        bars = [[value - interval.low], [interval.high - value]] if interval else None
        axes.errorbar(trial.figures[cost], value, bars, fmt="o", color=COLOUR, markersize=5, linewidth=0.8)
    front = [study.trials[index] for index in front_of(study, metric, cost)]
    places = [(trial.figures[cost], trial.figures[metric]) for trial in front]
    axes.step(*zip(*places, strict=True), where="post", color=FRONT_COLOUR, label="Pareto front")
    # Matplotlib reads text between dollar signs as mathematics.
    axes.set_xlabel(COSTS[cost].replace("$", r"\$"))
    axes.set_ylabel(metric.replace("$", r"\$"))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return True
