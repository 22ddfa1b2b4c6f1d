"""Render a study as one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusion_core.files import sha256, write_text
from diffusion_core.report.contents import Column, columns_of, front_table, plot_data, ranking, script_json, text_of
from diffusion_core.report.findings import Candidate, candidates, equal_to
from diffusion_core.report.importance import importances
from diffusion_core.report.markdown import write_markdown
from diffusion_core.report.study import COSTS, RUNS, Study, Trial
from diffusion_core.report.words import headline, notes

SCRIPTS = ("base.js", "table.js", "plots.js", "start.js")
"""The page's own scripts, in their order."""
WEB = ("https://", "http://")
REFRESH_SECONDS = 20
"""Seconds after which a page of a running sweep loads itself again."""


def render(study: Study) -> str:
    """Return the page of a study.

    All texts of the study are escaped. The content security policy allows the page's own scripts by their hashes, and
    no connection to anywhere, so that a text that escaped escaping could neither run nor load anything.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # Slow to import.
    from markupsafe import Markup

    study = study.without_secrets()
    ranked = candidates(study)
    winner = ranked[0] if ranked else None
    columns, order = columns_of(study), ranking(study)
    # The page can be read and used before plotly.js, the largest part, is parsed.
    scripts = [*(source(name) for name in SCRIPTS), plotly_source()]
    environment = Environment(
        loader=PackageLoader("diffusion_core.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        **_texts(study, winner, ranked),
        columns=columns,
        rows=[_row(study.trials[index], columns) for index in order],
        order=order,
        importance=importances(study),
        pair=_pair(study),
        front=front_table(study),
        kind=study.kind,
        running=study.running,
        refresh=REFRESH_SECONDS,
        data=Markup(script_json(plot_data(study, order))),
        style=Markup(source("style.css")),
        scripts=[Markup(script) for script in scripts],
        policy=" ".join(f"'sha256-{_base64_hash(script)}'" for script in scripts),
    )


def write_page(study: Study, path: Path, *, markdown: bool = False) -> None:
    """Write a study to a file, as HTML or as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if markdown:
        write_markdown(study, path)
    else:
        write_text(path, render(study))


def _texts(study: Study, winner: Candidate | None, ranked: list[Candidate]) -> dict[str, Any]:
    """Return the texts at the top of a page."""
    equal = equal_to(winner, ranked) if winner else []
    return {
        "title": study.title,
        "method": study.method,
        "searched": dict(study.searched),
        "states": study.states(),
        "total": len(study.trials),
        "links": {label: address for label, address in study.links.items() if address.startswith(WEB)},
        "headline": headline(study, winner),
        "notes": notes(study, winner, ranked),
        "winner": winner.best.name if winner else "",
        "protocol": winner.best.protocols.get(study.metric or "", "") if winner else "",
        "reproduce": winner.best.reproduce if winner else "",
        "sample": winner.best.sample if winner else "",
        "equal": [{"name": other.best.name, "text": other.text()} for other in equal],
        "repeated": [
            {"name": group.best.name, "seeds": len(group.trials), "text": group.text()}
            for group in ranked
            if len(group.trials) > 1
        ],
        "protocols": sorted({(name, line) for trial in study.trials for name, line in trial.protocols.items()}),
    }


def _row(trial: Trial, columns: list[Column]) -> dict[str, Any]:
    values = [column.value(trial) for column in columns]
    cells = [
        {
            "text": text_of(value),
            # What sorting and filtering compare: numbers in full.
            "value": repr(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else None,
        }
        for value in values
    ]
    return {"name": trial.name, "state": trial.state, "cells": cells}


def _pair(study: Study) -> dict[str, Any] | None:
    """Return what differs between two runs; None for any other number of trials."""
    if study.kind != RUNS or len(study.trials) != 2:
        return None
    first, second = study.trials
    settings = [(key, text_of(first.settings.get(key)), text_of(second.settings.get(key))) for key in study.varied]
    names = [name for name in [*study.qualities(), *study.costs()] if {name} & (first.figures.keys() | second.figures)]
    figures = [
        (COSTS.get(name, name), text_of(first.figures.get(name)), text_of(second.figures.get(name))) for name in names
    ]
    return {"names": [first.name, second.name], "settings": settings, "figures": figures}


def source(name: str) -> str:
    """Return the text of a file beside the template."""
    return (files("diffusion_core.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def plotly_source() -> str:
    """Return the script of plotly.js that the package plotly brings along."""
    found = find_spec("plotly")  # The package itself is slow to import.
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'plotly'")
    return (Path(found.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _base64_hash(text: str) -> str:
    return base64.b64encode(bytes.fromhex(sha256(text))).decode("ascii")
