"""A sweep as a report on W&B, and its HTML page in its best run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from agent.tracking.api import api_errors
from diffusion_core.config import ConfigError
from diffusion_core.redact import redacted_arguments
from diffusion_core.report.blocks import blocks_of
from diffusion_core.report.findings import candidates
from diffusion_core.report.study import SWEEP, Study
from diffusion_core.tracking import STEP

PAGE = "report"
"""Name of the HTML page in a run, and type of its artifact."""


def publish(path: str, study: Study, page: Path) -> None:
    """Make a report about a sweep on W&B, log its HTML page (:func:`log_page`), and print where they are.

    Args:
        path: ``ENTITY/PROJECT/SWEEP_ID``.
        study: the sweep.
        page: the HTML page.

    Raises:
        ConfigError: if the package wandb-workspaces is missing, the study is a single run, or W&B refuses.
    """
    if study.kind != SWEEP:
        raise ConfigError(f"--wandb: {path!r} is a run; name a sweep")
    try:
        import wandb_workspaces.reports.v2 as wr
    except ModuleNotFoundError:
        raise ConfigError('--wandb: needs wandb-workspaces: pip install "diffusion-sweeps[reports]"') from None
    entity, project, _ = path.split("/")
    states = ", ".join(f"{count} {state}" for state, count in study.states().items())
    public = study.without_secrets()
    with api_errors(f"--wandb: {path!r}"):
        made = wr.Report(project=project, entity=entity, title=public.title[:128], width="fluid",
                         description=f"{public.method}: {len(public.trials)} trials, {states}",
                         blocks=blocks_of(wr, path, public)).save()  # fmt: skip
        print(f"report on W&B: {_address(made)}", flush=True)
    log_page(path, study, page)


def log_page(path: str, study: Study, page: Path) -> None:
    """Log the HTML page of a sweep on W&B to the sweep's best run, and as an artifact; print where it is.

    Args:
        path: ``ENTITY/PROJECT/SWEEP_ID``.
        study: the sweep; without a best run, nothing is logged.
        page: the HTML page.

    Raises:
        ConfigError: if W&B refuses.
    """
    entity, project, sweep = path.split("/")
    if ranked := candidates(study.without_secrets()):
        best = ranked[0].best
        with api_errors(f"{path!r}: the page {str(page)!r}"):
            _log(entity, project, best.name, best.step, f"{PAGE}-{sweep}", page)
        print(f"page: in run {best.name} and in its artifact {PAGE}-{sweep}", flush=True)


def _address(made: Any) -> str:
    """Return the web address of a report. W&B finds it by its id; the package does not escape its title."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", made.title)
    return f"{made.url.partition('/reports/')[0]}/reports/{slug}--{made.id}"


def _log(entity: str, project: str, run_id: str, step: int | None, artifact_name: str, page: Path) -> None:
    """Log a page to a run that has ended, whose console output stays as it is."""
    import wandb

    settings = wandb.Settings(console="off", silent=True)
    with redacted_arguments(), wandb.init(entity=entity, project=project, id=run_id, resume="must",
                                          mode="online", settings=settings) as run:  # fmt: skip
        at = {} if step is None else {STEP: step}
        run.log({PAGE: wandb.Html(page.read_text(encoding="utf-8"), inject=False), **at})
        artifact = wandb.Artifact(artifact_name, type=PAGE)
        artifact.add_file(str(page))
        run.log_artifact(artifact)
