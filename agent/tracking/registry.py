"""Publish models: link the best one of a sweep to a registry, and add figures to an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agent.tracking.api import api_errors, client, find_artifact
from agent.tracking.environment import load_environment
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config.metrics import goal_of, goals, is_better
from diffusion_core.evaluation.protocol import PREFIX
from diffusion_core.runs.recorded import summary_figures
from diffusion_core.tracking import BEST, MODEL


def best_model(sweep: str) -> str:
    """Return the best model of the best run of a sweep, as ``ENTITY/PROJECT/model-RUN_ID:best``.

    Args:
        sweep: ``ENTITY/PROJECT/SWEEP_ID``.

    Raises:
        CheckpointError: if the sweep does not exist, or none of its runs has its metric.
    """
    option = f"--sweep = {sweep!r}"
    with api_errors(option, CheckpointError):
        found = client().sweep(sweep)
        metric = found.config.get("metric", {}).get("name")
        runs = list(found.runs)
    if metric is None or goal_of(metric) is None:
        raise CheckpointError(f"{option}: its metric is {metric!r}; expected one of {', '.join(goals())}")
    best, best_value = None, None
    for run in runs:
        value = summary_figures(run.summary).get(metric)
        if value is not None and is_better(metric, value, best_value):
            best, best_value = run, value
    if best is None:
        raise CheckpointError(f"{option}: none of its {len(runs)} runs has {metric}")
    return f"{best.entity}/{best.project}/{MODEL}-{best.id}:{BEST}"


def promote(name: str, registry: str, collection: str, aliases: Sequence[str]) -> str:
    """Link a model to a collection of a registry. Return the collection's path.

    Args:
        name: the artifact, as :func:`agent.tracking.api.find_artifact` takes it.
        registry: name of the registry, such as ``model``, optionally preceded by ``ORGANIZATION/``.
        collection: name of the collection. It is created if it does not exist.
        aliases: aliases of the version in the collection, besides ``latest``.

    Raises:
        CheckpointError: if the model does not exist, or the entity has no registry.
    """
    organization, _, registry = registry.rpartition("/")
    target = "/".join([*([organization] if organization else []), f"wandb-registry-{registry}", collection])
    with api_errors(f"--artifact = {name!r}", CheckpointError):
        artifact = find_artifact(name)
        if artifact.type != MODEL:
            raise CheckpointError(f"--artifact = {name!r}: its type is {artifact.type!r}; expected 'model'")
    try:
        with api_errors(f"--registry = {registry!r}", CheckpointError):
            artifact.link(target, aliases=list(aliases))
    except CheckpointError as error:
        if "organization" not in str(error).lower():
            raise
        raise CheckpointError(
            f"--registry = {registry!r}: {artifact.entity!r} is a personal entity without a registry; registries "
            f"belong to organizations: log the sweep to a team (WANDB_ENTITY), or give --registry ORG/{registry}"
        ) from None
    return target


def publish(artifact_name: str, figures: Mapping[str, float], protocols: Mapping[str, str]) -> str:
    """Add figures to a `model` artifact's metadata. Return the artifact's full name.

    They are added to its run's summary as well if it is the run's best model, or the newest one if none is the best.

    Raises:
        CheckpointError: if W&B cannot be reached, or refuses.
    """
    load_environment()
    with api_errors("--wandb", CheckpointError):
        artifact = find_artifact(artifact_name)
        metadata: dict[str, Any] = dict(artifact.metadata)
        artifact.metadata = metadata | {
            "figures": dict(metadata.get("figures", {})) | dict(figures),
            "protocols": dict(metadata.get("protocols", {})) | dict(protocols),
        }
        artifact.save()
        run = artifact.logged_by()
        if run is not None and find_artifact(artifact_name.partition(":")[0]).version == artifact.version:
            run.summary.update({**figures, **{f"{PREFIX}{name}": line for name, line in protocols.items()}})
        return str(artifact.qualified_name)
