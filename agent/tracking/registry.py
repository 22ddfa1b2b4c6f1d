"""Publish models: link the best one of a sweep to a registry, and add figures to an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agent.tracking.artifacts import full_name
from agent.tracking.environment import load_environment
from agent.tracking.sweeps import flat_summary
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config.metrics import GOALS, goal_of, is_better
from diffusion_core.evaluation.protocol import PREFIX
from diffusion_core.messages import one_line
from diffusion_core.tracking import BEST, MODEL


def best_model(sweep: str) -> str:
    """The best model of the best run of a sweep, as ``ENTITY/PROJECT/model-RUN_ID:best``.

    Args:
        sweep: ``ENTITY/PROJECT/SWEEP_ID``.

    Raises:
        CheckpointError: if there is no such sweep, or none of its runs has its metric.
    """
    import wandb

    try:
        found = wandb.Api().sweep(sweep)
        metric = found.config.get("metric", {}).get("name")
        runs = list(found.runs)
    except (wandb.errors.Error, ValueError, TypeError) as error:
        raise CheckpointError(f"--sweep = {sweep!r}: {one_line(error)}") from None
    if metric is None or goal_of(metric) is None:
        raise CheckpointError(f"--sweep = {sweep!r}: its metric is {metric!r}; expected one of {', '.join(GOALS)}")
    best, value = None, None
    for run in runs:
        reached = flat_summary(dict(run.summary)).get(metric)
        if reached is not None and is_better(metric, reached, value):
            best, value = run, reached
    if best is None:
        raise CheckpointError(f"--sweep = {sweep!r}: none of its {len(runs)} runs has {metric}")
    return f"{best.entity}/{best.project}/{MODEL}-{best.id}:{BEST}"


def promote(name: str, registry: str, collection: str, aliases: Sequence[str]) -> str:
    """Link a model to a collection of a registry; returns the collection's path.

    Args:
        name: of the artifact: ``model-RUN_ID:best``, optionally with project and entity in front.
        registry: its name in the organization, such as ``model``, optionally with ``ORGANIZATION/`` in front.
        collection: in that registry; it is made if there is none.
        aliases: what the version is called there, besides ``latest``.

    Raises:
        CheckpointError: if there is no such model, or the entity has no registry.
    """
    import wandb

    organization, _, registry = registry.rpartition("/")
    target = "/".join([*([organization] if organization else []), f"wandb-registry-{registry}", collection])
    try:
        api = wandb.Api()
        artifact = api.artifact(full_name(name, api.default_entity), type=MODEL)
    except (wandb.errors.Error, ValueError) as error:
        raise CheckpointError(f"--artifact = {name!r}: {one_line(error)}") from None
    try:
        artifact.link(target, aliases=list(aliases))
    except (wandb.errors.Error, ValueError) as error:
        if "organization" in str(error).lower():
            raise CheckpointError(
                f"--registry = {registry!r}: {artifact.entity!r} is a personal entity without a registry; registries "
                f"belong to organizations: log the sweep to a team (WANDB_ENTITY), or give --registry ORG/{registry}"
            ) from None
        raise CheckpointError(f"--registry = {registry!r}: {one_line(error)}") from None
    return target


def publish(artifact_name: str, figures: Mapping[str, float], protocols: Mapping[str, str]) -> str:
    """Add figures to a `model` artifact's metadata and to its run's summary; returns the artifact's full name.

    Raises:
        CheckpointError: if W&B cannot be reached, or refuses.
    """
    load_environment()
    import wandb  # Slow to import.

    try:
        api = wandb.Api()
        artifact = api.artifact(full_name(artifact_name, api.default_entity))
        metadata: dict[str, Any] = dict(artifact.metadata)
        artifact.metadata = metadata | {
            "figures": dict(metadata.get("figures", {})) | dict(figures),
            "protocols": dict(metadata.get("protocols", {})) | dict(protocols),
        }
        artifact.save()
        run = artifact.logged_by()
        if run is not None:
            run.summary.update({**figures, **{f"{PREFIX}{name}": line for name, line in protocols.items()}})
        return str(artifact.qualified_name)
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise CheckpointError(f"--wandb: {one_line(error)}") from None
