"""The blocks of a report on W&B about a sweep, made of the classes of the package wandb-workspaces.

The package is passed in: it imports W&B's client, which this folder does not.
"""

from __future__ import annotations

from typing import Any

from diffusion_core.config.metrics import goal_of
from diffusion_core.report.contents import curve_names
from diffusion_core.report.findings import candidates
from diffusion_core.report.markdown import escaped
from diffusion_core.report.study import COSTS, Study
from diffusion_core.report.words import headline, notes
from diffusion_core.tables import markdown_table
from diffusion_core.tracking import MODEL, STEP

MEDIA = ("samples", "diffusion", "opinions")
"""Pictures and tables of a run, by the names that they are logged under."""
MOST_COLUMNS = 8
"""Settings on parallel coordinates."""
MOST_COSTS = 4


def blocks_of(wr: Any, path: str, study: Study) -> list[Any]:
    """Return the result in words, panels over the runs of a sweep, its samples, and its lineage.

    Args:
        wr: the module ``wandb_workspaces.reports.v2``.
        path: ``ENTITY/PROJECT/SWEEP_ID``.
        study: the sweep.
    """
    entity, project, sweep = path.split("/")
    ranked = candidates(study)
    winner = ranked[0] if ranked else None
    words = [f"**{escaped(headline(study, winner))}**", *map(escaped, notes(study, winner, ranked))]
    runs = wr.Runset(entity=entity, project=project, name=study.title, filters=f"Metric('Sweep') = '{sweep}'")

    def section(title: str, *panels: Any) -> list[Any]:
        return [wr.H2(text=title), wr.PanelGrid(runsets=[runs], panels=list(panels))] if panels else []

    curves = [wr.LinePlot(title=name, x=STEP, y=[name], layout=_half(wr, place))
              for place, name in enumerate(curve_names(study))]  # fmt: skip
    measured = study.metric in study.goals
    blocks = [
        wr.MarkdownBlock(text="\n\n".join(words)),
        *(section("Quality against cost", *_fronts(wr, study)) if measured else []),
        *(section("Settings", _parallel(wr, study), _importance(wr, study)) if measured else []),
        *section("Learning curves", *curves),
        *section("Samples", wr.MediaBrowser(media_keys=list(MEDIA), num_columns=4, layout=wr.Layout(w=24, h=16))),
        wr.H2(text="Lineage"),
        wr.MarkdownBlock(text=_lineage(study)),
    ]
    if winner is not None and winner.best.sample:
        name = f"{MODEL}-{winner.best.name}"
        blocks.append(wr.WeaveBlockArtifact(entity=entity, project=project, artifact=name, tab="lineage"))
    return blocks


def in_summary(figure: str) -> str:
    """Return where a run's summary has a figure: W&B nests the best value of those with a goal."""
    goal = goal_of(figure)
    return figure if goal is None or "*" in figure else f"{figure}.{goal[:3]}"


def _half(wr: Any, place: int) -> Any:
    """Return the layout of a panel in two columns, by its number from 0."""
    return wr.Layout(x=12 * (place % 2), y=8 * (place // 2), w=12, h=8)


def _fronts(wr: Any, study: Study) -> list[Any]:
    """Return a scatter plot of the metric against each cost, the one that tells trials apart first."""
    costs = [name for name in study.costs() if name.startswith("model/")]
    costs.sort(key=lambda name: name != study.first_cost())
    quality = wr.SummaryMetric(in_summary(str(study.metric)))
    return [
        wr.ScatterPlot(title=COSTS[name], x=wr.SummaryMetric(name), y=quality, layout=_half(wr, place))
        for place, name in enumerate(costs[:MOST_COSTS])
    ]


def _parallel(wr: Any, study: Study) -> Any:
    """Return parallel coordinates of the varied settings and the metric."""

    class Setting(wr.ParallelCoordinatesPlotColumn):
        """A setting of a run. Ours have dots in their names, which the package takes for nested settings."""

        def _to_model(self) -> Any:
            column = super()._to_model()
            column.accessor = f"config:{self.metric.name}.value"
            return column

    settings = [Setting(metric=wr.Config(key), display_name=key) for key in study.varied[:MOST_COLUMNS]]
    quality = wr.ParallelCoordinatesPlotColumn(
        metric=wr.SummaryMetric(in_summary(str(study.metric))), display_name=study.metric
    )
    return wr.ParallelCoordinatesPlot(columns=[*settings, quality], layout=wr.Layout(w=16, h=10))


def _importance(wr: Any, study: Study) -> Any:
    layout = wr.Layout(x=16, w=8, h=10)
    return wr.ParameterImportancePlot(with_respect_to=in_summary(str(study.metric)), layout=layout)


def _lineage(study: Study) -> str:
    """Return a table of the trials, the models that they started from, and their own."""
    rows = [
        [
            escaped(trial.name),
            escaped(trial.parent or "random weights"),
            escaped(f"{MODEL}-{trial.name}"),
            " ".join(f"[open]({link})" for link in trial.links.values()),
        ]
        for trial in study.trials
    ]
    return "\n".join(markdown_table(["run", "starts from", "model", "page"], rows))
