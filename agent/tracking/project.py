"""Read and write what a W&B project holds as a whole: finished runs, tables, versions without an alias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from agent.tracking.api import api_errors, client
from agent.tracking.environment import load_environment
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.choice import wanted_step
from diffusion_core.redact import redacted_arguments
from diffusion_core.runs.leftovers import Leftover
from diffusion_core.runs.recorded import flat_summary
from diffusion_core.tracking import BEST, MODEL, STATE


def finished_runs(name: str, which: str) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Yield id, summary, and metadata of the chosen and the newest model of each finished run of a project.

    Args:
        name: ``PROJECT`` or ``ENTITY/PROJECT``.
        which: version of the model, as in :mod:`diffusion_core.choice`: ``best``, ``newest`` or a step.

    Raises:
        ConfigError: if W&B cannot be reached, or has no such project.
        CheckpointError: if ``which`` is something else.
    """
    load_environment()
    wanted_step(which)
    with api_errors(f"--project = {name!r}"):
        for run in client().runs(name, filters={"state": "finished"}):
            yield run.id, flat_summary(run.summary), _models(run, which)


def best_model(run: Any) -> dict[str, Any]:
    """Return the metadata of the best model of a run, or of its newest one; empty if there is none."""
    return next(iter(_models(run, BEST)), {})


def _models(run: Any, which: str) -> list[dict[str, Any]]:
    """Return the metadata of the model that ``which`` chooses and of the newest one; nothing if none is chosen."""
    step = wanted_step(which)
    models = [model for model in run.logged_artifacts() if model.name.startswith(f"{MODEL}-{run.id}:")]
    models.sort(key=lambda model: model.metadata.get("step", -1))
    best = [model for model in models if which == BEST and BEST in model.aliases]
    chosen = best or [model for model in models if step in (None, model.metadata.get("step"))]
    return [dict(chosen[-1].metadata), dict(models[-1].metadata)] if chosen else []


def log_table(project: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table in a new run of a project, ``PROJECT`` or ``ENTITY/PROJECT``; ConfigError if W&B refuses."""
    import wandb

    entity, _, bare = project.rpartition("/")
    run_of = partial(wandb.init, entity=entity or None, project=bare, job_type=name, name=name, mode="online")
    with api_errors(f"--upload: --project = {project!r}"), redacted_arguments(), run_of() as run:
        run.log({name: wandb.Table(columns=list[str | int](columns), data=[list(row) for row in rows])})


def versions_without_alias(project: str) -> Iterator[Leftover]:
    """Yield the versions of a project's models and training states that have no alias and no link.

    Raises:
        CheckpointError: if W&B has no such project, or does not answer.
    """
    with api_errors(f"--project = {project!r}", CheckpointError):
        api = client()
        len(api.runs(project, per_page=1))  # Names the project if there is none; the next question does not.
        kinds = {known.name for known in api.artifact_types(project)} & {MODEL, STATE}
        for kind in sorted(kinds):
            for collection in api.artifact_type(kind, project).collections():
                for version in collection.artifacts():
                    if not version.aliases and not version.linked_artifacts:
                        guarded = api_errors(f"{version.name!r}: not deleted", CheckpointError)
                        yield Leftover(version.name, version.size, guarded(version.delete))
