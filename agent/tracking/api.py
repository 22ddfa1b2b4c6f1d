"""Names and errors of W&B's public API."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from agent.tracking.environment import api_key, has_key
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.choice import wanted_step
from diffusion_core.config import ConfigError
from diffusion_core.messages import one_line
from diffusion_core.tracking import BEST

if TYPE_CHECKING:
    from wandb import Api, Artifact
    from wandb.sdk.wandb_run import Run

DEFAULT_PROJECT = "diffusion-sweeps"
STEP_ALIAS = "step-"
"""Prefix of the alias of the checkpoint of a step."""


def project_name() -> str:
    """Return the project of this environment: WANDB_PROJECT, that of ``wandb init``, or :data:`DEFAULT_PROJECT`."""
    import wandb

    return os.environ.get("WANDB_PROJECT") or wandb.setup().settings.project or DEFAULT_PROJECT


def entity_name() -> str | None:
    """Return the entity of this environment: WANDB_ENTITY, that of ``wandb init``, or that of the key's owner."""
    api = client()
    return os.environ.get("WANDB_ENTITY") or api.settings["entity"] or api.default_entity


def client() -> Api:
    """Return W&B's public API.

    Raises:
        ValueError: if there is no API key; W&B would ask for one.
    """
    import wandb

    if not has_key():
        raise ValueError("no W&B API key; set WANDB_API_KEY (see .env.example), or run `wandb login`")
    return wandb.Api()


def find_artifact(name: str, which: str = BEST) -> Artifact:
    """Return an artifact by ``NAME`` or ``NAME:ALIAS``, optionally preceded by ``PROJECT/`` or ``ENTITY/PROJECT/``.

    Without an alias, ``which`` chooses the version as :mod:`diffusion_core.choice` chooses a checkpoint: the best one,
    or the newest if none is the best; the newest; or that of a step.
    """
    api, step = client(), wanted_step(which)
    if name.count("/") == 0:
        name = f"{project_name()}/{name}"
    if name.count("/") == 1 and (entity := entity_name()):
        name = f"{entity}/{name}"
    if ":" in name and which != BEST:
        raise CheckpointError(f"--which = {which!r}: {name!r} names a version already; leave one of them out")
    if ":" in name:
        return api.artifact(name)
    if step is not None:
        return api.artifact(f"{name}:{STEP_ALIAS}{step}")
    is_best = which == BEST and api.artifact_exists(f"{name}:{BEST}")
    return api.artifact(f"{name}:{BEST if is_best else 'latest'}")


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that W&B's API raises if a request fails or its answer cannot be used."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    return (wandb.errors.Error, WandbApiFailedError, ValueError, KeyError, TypeError, OSError)


def server_status(within_s: float = 5.0) -> int | None:
    """Return the HTTP status of W&B's answer to a question that every valid API key may ask; None without an answer."""
    import requests
    import wandb

    settings, key = wandb.setup().settings, api_key()
    try:
        return requests.post(
            f"{settings.base_url}/graphql",
            json={"query": "query Viewer { viewer { id } }"},
            auth=("api", key) if key else None,
            headers=settings.x_extra_http_headers,
            timeout=within_s,
        ).status_code
    except requests.RequestException:
        return None


def ask(run: Run, query: str, within_s: int = 20, **variables: Any) -> Any:
    """Return what the server says of a run: the part below ``project { run { ... } }`` of the answer to a query.

    For fields that W&B's public API does not expose.
    """
    import wandb

    names = {"entity": run.entity, "project": run.project, "run": run.id}
    service = wandb.Api(timeout=within_s)._service_api
    answer: Any = service.execute_graphql(query, variables=names | variables, timeout=within_s)
    return answer["project"]["run"]


@contextmanager
def api_errors(request: str, kind: type[ConfigError] | type[CheckpointError] = ConfigError) -> Iterator[None]:
    """Turn a failure of W&B's API into an error with one line for the user.

    Args:
        request: the option and its value, as the start of the message: ``--project = 'name'``.
        kind: the type of the error.
    """
    try:
        yield
    except (ConfigError, CheckpointError):
        raise
    except failures() as error:
        raise kind(f"{request}: {one_line(error)}") from None
