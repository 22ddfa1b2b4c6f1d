"""Read and write what a W&B project holds as a whole: finished runs, tables, versions without an alias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from agent.tracking.api import api_errors, flat_summary
from agent.tracking.environment import load_environment
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.tracking import MODEL, STATE

if TYPE_CHECKING:
    from wandb import Artifact


def finished_runs(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return id and summary of each finished run of a project, ``PROJECT`` or ``ENTITY/PROJECT``.

    Raises:
        ConfigError: if W&B cannot be reached, or has no such project.
    """
    load_environment()
    import wandb  # Slow to import.

    with api_errors(f"--project = {name!r}"):
        runs = wandb.Api().runs(name, filters={"state": "finished"})
        return [(run.id, flat_summary(run.summary)) for run in runs]


def log_table(project: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table in a new run of a project, ``PROJECT`` or ``ENTITY/PROJECT``."""
    import wandb

    entity, _, project = project.rpartition("/")
    with wandb.init(entity=entity or None, project=project, job_type=name, name=name) as run:
        run.log({name: wandb.Table(columns=list[str | int](columns), data=[list(row) for row in rows])})


def versions_without_alias(project: str) -> Iterator[Artifact]:
    """Yield the versions of a project's models and training states that have no alias and no link.

    Raises:
        CheckpointError: if W&B has no such project, or does not answer.
    """
    import wandb

    with api_errors(f"--project = {project!r}", CheckpointError):
        api = wandb.Api()
        kinds = {known.name for known in api.artifact_types(project)} & {MODEL, STATE}
        for kind in sorted(kinds):
            for collection in api.artifact_type(kind, project).collections():
                for version in collection.artifacts():
                    if not version.aliases and not version.linked_artifacts:
                        yield version
