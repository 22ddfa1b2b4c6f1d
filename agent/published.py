"""Figures measured afterwards, into W&B: the summary of the run that a model is from, and the artifact's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.artifacts import full_name
from agent.settings import load_environment
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.evaluation.protocol import PREFIX


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
        raise CheckpointError(f"--wandb: {' '.join(str(error).split())[:300]}") from None
