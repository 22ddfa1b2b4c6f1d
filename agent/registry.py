"""The best model of a sweep becomes a version of a registry collection, where others look for it."""

from __future__ import annotations

from collections.abc import Sequence

from agent.artifacts import full_name
from agent.checkpoints import MODEL
from agent.online import flat_summary
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.figure_names import GOALS, goal_of, is_better
from diffusion_core.uploads import BEST


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
        raise CheckpointError(f"--sweep = {sweep!r}: {_one_line(error)}") from None
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
        raise CheckpointError(f"--artifact = {name!r}: {_one_line(error)}") from None
    try:
        artifact.link(target, aliases=list(aliases))
    except (wandb.errors.Error, ValueError) as error:
        if "organization" in str(error).lower():
            raise CheckpointError(
                f"--registry = {registry!r}: {artifact.entity!r} is a personal entity without a registry; registries "
                f"belong to organizations: log the sweep to a team (WANDB_ENTITY), or give --registry ORG/{registry}"
            ) from None
        raise CheckpointError(f"--registry = {registry!r}: {_one_line(error)}") from None
    return target


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
