"""A sweep as a report on W&B, made with the package wandb-workspaces, and the HTML page at its best run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.tracking.api import api_errors
from diffusion_core.config import ConfigError
from diffusion_core.config.metrics import goal_of
from diffusion_core.redact import redacted_arguments
from diffusion_core.report.contents import curve_names
from diffusion_core.report.findings import candidates
from diffusion_core.report.markdown import escaped
from diffusion_core.report.study import COSTS, SWEEP, Study
from diffusion_core.report.words import headline, notes
from diffusion_core.tables import markdown_table
from diffusion_core.tracking import MODEL, STEP

MEDIA = ("samples", "diffusion", "opinions")
"""Pictures and tables of a run, by the names that they are logged under."""
PAGE = "report"
"""Name of the HTML page in a run, and type of its artifact."""
MOST_COLUMNS = 8
"""Settings on parallel coordinates."""


def save_report(path: str, study: Study) -> str:
    """Create a report about a sweep on W&B, and return its web address.

    Args:
        path: ``ENTITY/PROJECT/SWEEP_ID``.
        study: the sweep.

    Raises:
        ConfigError: if the package is missing, W&B refuses, or the study is a single run.
    """
    if study.kind != SWEEP:
        raise ConfigError(f"--wandb: {path!r} is a run; name a sweep")
    try:
        import wandb_workspaces.reports.v2 as wr
    except ModuleNotFoundError:
        raise ConfigError('--wandb: needs wandb-workspaces: pip install "diffusion-sweeps[reports]"') from None
    entity, project, _ = path.split("/")
    study = study.without_secrets()
    with api_errors(f"--wandb: {path!r}"):
        found = wr.Report(project=project, entity=entity, title=study.title[:128], description=_description(study),
                          blocks=_blocks(wr, path, study), width="fluid").save()  # fmt: skip
    return str(found.url)


def log_page(path: str, study: Study, page: Path) -> str | None:
    """Log an HTML page to the best run of a sweep, as ``wandb.Html`` and as an artifact. Return the run's id, if any.

    Raises:
        ConfigError: if W&B refuses.
    """
    import wandb

    ranked = candidates(study)
    if not ranked:
        return None
    best, (entity, project, sweep) = ranked[0].best, path.split("/")
    # The run has ended: its console output is kept as it is.
    settings = wandb.Settings(console="off", silent=True)
    with (
        api_errors(f"--wandb: {path!r}"),
        redacted_arguments(),
        wandb.init(entity=entity, project=project, id=best.name, resume="must", settings=settings) as run,
    ):
        last = {} if best.step is None else {STEP: best.step}
        run.log({PAGE: wandb.Html(page.read_text(encoding="utf-8"), inject=False), **last})
        artifact = wandb.Artifact(f"{PAGE}-{sweep}", type=PAGE)
        artifact.add_file(str(page))
        run.log_artifact(artifact)
    return best.name


def _description(study: Study) -> str:
    states = ", ".join(f"{count} {state}" for state, count in study.states().items())
    return f"{study.method}: {len(study.trials)} trials, {states}"


def _blocks(wr: Any, path: str, study: Study) -> list[Any]:
    """Return the blocks of a report: the result in words, panels over the sweep's runs, and the lineage."""
    entity, project, sweep = path.split("/")
    ranked = candidates(study)
    winner = ranked[0] if ranked else None
    words = [f"**{escaped(headline(study, winner))}**", *map(escaped, notes(study, winner, ranked, []))]
    runs = wr.Runset(entity=entity, project=project, name=study.title, filters=f"Metric('Sweep') = '{sweep}'")

    def panels(*found: Any) -> Any:
        return wr.PanelGrid(runsets=[runs], panels=[panel for panel in found if panel is not None])

    blocks = [wr.MarkdownBlock(text="\n\n".join(words))]
    if study.metric in study.goals:
        blocks += [wr.H2(text="Quality against cost"), panels(*_fronts(wr, study))]
        blocks += [wr.H2(text="Settings"), panels(_parallel(wr, study), _importance(wr, study))]
    curves = [
        wr.LinePlot(title=name, x=STEP, y=[name], layout=wr.Layout(x=12 * (place % 2), y=8 * (place // 2), w=12, h=8))
        for place, name in enumerate(curve_names(study))
    ]
    blocks += [wr.H2(text="Learning curves"), panels(*curves)] if curves else []
    shown = wr.MediaBrowser(media_keys=list(MEDIA), num_columns=4, layout=wr.Layout(w=24, h=16))
    blocks += [wr.H2(text="Samples"), panels(shown), wr.H2(text="Lineage"), wr.MarkdownBlock(text=_lineage(study))]
    if winner is not None and winner.best.sample:
        name = f"{MODEL}-{winner.best.name}"
        blocks.append(wr.WeaveBlockArtifact(entity=entity, project=project, artifact=name, tab="lineage"))
    return blocks


def in_summary(figure: str) -> str:
    """Return where a run's summary has a figure: W&B nests the best value of those with a goal."""
    goal = goal_of(figure)
    return figure if goal is None or "*" in figure else f"{figure}.{goal[:3]}"


def _fronts(wr: Any, study: Study) -> list[Any]:
    """Return a scatter plot of the metric against each cost, the one that tells trials apart first."""
    costs = [name for name in study.costs() if name in COSTS and "/" in name]
    costs.sort(key=lambda name: name != study.first_cost())
    quality = wr.SummaryMetric(in_summary(str(study.metric)))
    return [
        wr.ScatterPlot(title=COSTS[name], x=wr.SummaryMetric(name), y=quality,
                       layout=wr.Layout(x=12 * (place % 2), y=8 * (place // 2), w=12, h=8))
        for place, name in enumerate(costs[:4])
    ]  # fmt: skip


def _parallel(wr: Any, study: Study) -> Any:
    """Return parallel coordinates of the varied settings and the metric."""

    class Setting(wr.ParallelCoordinatesPlotColumn):  # type: ignore[misc, name-defined]
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
    rows = [_row(trial.name, trial.parent, trial.links.values()) for trial in study.trials]
    return "\n".join(markdown_table(["run", "starts from", "model", "page"], rows))


def _row(name: str, parent: str | None, links: Any) -> Sequence[str]:
    pages = " ".join(f"[open]({link})" for link in links)
    return [escaped(name), escaped(parent or "random weights"), escaped(f"{MODEL}-{name}"), pages]
