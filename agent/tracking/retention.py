"""What W&B keeps of a run's checkpoints: the best, the newest ones; the rest is given a time to live."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from diffusion_core.messages import one_line

if TYPE_CHECKING:
    from wandb import Artifact

STEP_ALIAS = "step-"


class Retention:
    """Called with each version that has arrived: takes the older ones' ``step-N`` from them, and gives them a TTL.

    Args:
        keep: the newest versions that stay as they are, besides the best and the latest one.
        ttl_days: how long the others live; None: for ever, without an alias (`python -m agent.clean` removes them).
    """

    def __init__(self, keep: int, ttl_days: int | None) -> None:
        self.keep = keep
        self.ttl_days = ttl_days

    def __call__(self, artifact: Artifact) -> None:
        """Release the versions that are older than the newest ``keep``. Prints W&B's errors and does not raise them."""
        import wandb

        collection = artifact.name.partition(":")[0]
        try:
            api = wandb.Api()
            versions = list(api.artifacts(artifact.type, f"{artifact.entity}/{artifact.project}/{collection}"))
            versions.sort(key=lambda version: version.metadata.get("step", -1), reverse=True)
            for version in versions[self.keep :]:
                # One that anybody gave a name to is none of ours.
                if version.aliases and all(alias.startswith(STEP_ALIAS) for alias in version.aliases):
                    self._release(version)
        except Exception as error:  # Tidying up ends no upload.
            print(f"W&B: old versions of {collection} stay: {one_line(error)}", file=sys.stderr)

    def _release(self, version: Artifact) -> None:
        version.aliases = []
        if self.ttl_days is not None:
            version.ttl = timedelta(days=self.ttl_days)
        version.save()
