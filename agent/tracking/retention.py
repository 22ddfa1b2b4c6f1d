"""Limit how many versions of an artifact W&B keeps: the newest ones, and those with an alias such as `best`."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from agent.tracking.api import STEP_ALIAS
from diffusion_core.messages import one_line
from diffusion_core.terminal.progress import say

if TYPE_CHECKING:
    from wandb import Artifact


class Retention:
    """Called with each uploaded version: remove the ``step-N`` alias from older versions and give them a TTL.

    Args:
        keep: number of newest versions to leave alone, besides `best` and `latest`.
        ttl_days: lifetime of the others in days. None: no limit; `python -m agent.clean` removes them.
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
                # Skip versions with aliases that a user added.
                if version.aliases and all(alias.startswith(STEP_ALIAS) for alias in version.aliases):
                    self._release(version)
        except Exception as error:  # A failed clean-up must not stop uploads.
            say(f"W&B: could not release old versions of {collection}: {one_line(error)}")

    def _release(self, version: Artifact) -> None:
        version.aliases = []
        if self.ttl_days is not None:
            version.ttl = timedelta(days=self.ttl_days)
        version.save()
