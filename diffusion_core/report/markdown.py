"""Render a study as Markdown with PNG pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from diffusion_core.files import replaced_file, write_text
from diffusion_core.report.contents import columns_of, front_table, ranking, text_of
from diffusion_core.report.findings import candidates, equal_to, front_of, trial_interval
from diffusion_core.report.importance import importances
from diffusion_core.report.pictures import shrunk
from diffusion_core.report.plots import GREY, colour, counts, make_room, marker, panels, plain, save
from diffusion_core.report.study import COSTS, Study, Trial
from diffusion_core.report.words import BETTER, headline, notes
from diffusion_core.tables import markdown_table

MOST_ROWS = 50
"""Trials in the table; the best come first."""
PICTURES = 3
"""Trials whose grids are written."""
MOST_KINDS = 6
"""Values of a setting that a plot can tell apart by colour and marker."""
MOST_NAMED = 10
"""Trials of the front that are labelled with their settings."""


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
    lines += [line for note in notes(study, winner, ranked) for line in (escaped(note), "")]
    if (front := front_table(study)) is not None:
        head, *rows = [[escaped(text) for text in row] for row in (front[0], *front[1])]
        lines += ["## Pareto front", "", *markdown_table(head, rows), ""]
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
    """Plot the metric against the first cost that tells trials apart, with the Pareto front.

    Colours and markers tell the values of one varied setting apart. Trials on the front are labelled with the others.

    Return False and write nothing if the metric has no goal, or no trial has both figures.
    """
    metric, cost = study.metric or "", study.first_cost() or ""
    if metric not in study.goals:
        return False
    known = [t for t in study.trials if t.value(metric) is not None and t.value(cost) is not None]
    if not known:
        return False
    figure, (axes,) = panels(7.0, 4.2)
    front = [study.trials[index] for index in front_of(study, metric, cost)]
    places = [(trial.figures[cost], trial.figures[metric]) for trial in front]
    if places:  # Trials that failed are drawn, but are on no front.
        axes.step(*zip(*places, strict=True), where="post", color=GREY, linestyle=":", label="Pareto front")
    key = _telling(study, known)
    kinds: dict[str, list[Trial]] = {}
    for trial in known:
        kinds.setdefault(text_of(trial.settings.get(key)) if key else "trials", []).append(trial)
    for index, (kind, trials) in enumerate(kinds.items()):
        label = f"{_last(key)} {kind}" if key else kind
        costs, values = [trial.figures[cost] for trial in trials], [trial.figures[metric] for trial in trials]
        axes.plot(costs, values, marker(index), color=colour(index), markersize=7, alpha=0.85, label=plain(label))
        for x, y, trial in zip(costs, values, trials, strict=True):
            if interval := trial_interval(trial, metric):
                axes.errorbar(x, y, [[y - interval.low], [interval.high - y]], color=colour(index), linewidth=0.8)
    others = [name for name in study.varied if name != key]
    labels = []
    for trial in front[:MOST_NAMED]:
        words = ", ".join(f"{_last(name)} {text_of(trial.settings[name])}" for name in others if name in trial.settings)
        place = trial.figures[cost], trial.figures[metric]
        labels.append(axes.annotate(plain(words), place, (6, 6), fontsize=8, textcoords="offset points"))
    counts(axes)
    axes.set_xlabel(plain(COSTS[cost]))
    axes.set_ylabel(plain(f"{metric} ({BETTER[study.goals[metric]]})"))
    axes.legend(frameon=False)
    make_room(figure, axes, labels)
    save(figure, path)
    return True


def _telling(study: Study, trials: Sequence[Trial]) -> str | None:
    """Return the varied setting whose values a plot tells apart: one of words if there is one, with few values."""
    found = []
    for key in study.varied:
        values = [trial.settings.get(key) for trial in trials]
        count = len({text_of(value) for value in values})
        if 1 < count <= MOST_KINDS:
            numeric = all(isinstance(value, int | float) for value in values)
            found.append((numeric, count, key))
    return min(found)[2] if found else None


def _last(key: str | None) -> str:
    """Return the last part of a dotted key, as a label: ``prune.keep`` is ``keep``."""
    return (key or "").rpartition(".")[2]
