"""What a W&B project holds: finished runs, tables, versions that no alias holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from agent.tracking.environment import load_environment
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError
from diffusion_core.config.metrics import goal_of
from diffusion_core.messages import one_line
from diffusion_core.tracking import MODEL, STATE

if TYPE_CHECKING:
    from wandb import Artifact


def best_value(name: str, value: Any) -> Any:
    """A summary's value: of a figure with a goal W&B keeps the best one, as a mapping."""
    if hasattr(value, "get") and not isinstance(value, str):
        return value.get("min" if goal_of(name) == "minimize" else "max")
    return value


def finished_runs(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Id and summary of each finished run of a project, ``PROJECT`` or ``ENTITY/PROJECT``.

    Raises:
        ConfigError: if W&B cannot be reached, or has no such project.
    """
    load_environment()
    import wandb  # Slow to import.

    try:
        return [
            (run.id, {key: best_value(key, value) for key, value in dict(run.summary).items()})
            for run in wandb.Api().runs(name, filters={"state": "finished"})
        ]
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise ConfigError(f"--project = {name!r}: {one_line(error)}") from None


def log_table(project: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table in a run of its own in a project, ``PROJECT`` or ``ENTITY/PROJECT``."""
    import wandb

    entity, _, project = project.rpartition("/")
    with wandb.init(entity=entity or None, project=project, job_type=name, name=name) as run:
        run.log({name: wandb.Table(columns=list[str | int](columns), data=[list(row) for row in rows])})


def versions_without_alias(project: str) -> Iterator[Artifact]:
    """Versions of a project's models and training states that have no alias.

    Raises:
        CheckpointError: if W&B has no such project, or does not answer.
    """
    import wandb

    try:
        api = wandb.Api()
        for kind in (MODEL, STATE):
            if kind not in {known.name for known in api.artifact_types(project)}:
                continue
            for collection in api.artifact_type(kind, project).collections():
                for version in collection.artifacts():
                    if not version.aliases and not version.linked_artifacts:
                        yield version
    except (wandb.errors.Error, ValueError) as error:
        reason = one_line(error)
        raise CheckpointError(f"--project = {project!r}: {reason}") from None
