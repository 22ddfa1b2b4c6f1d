"""The tracker that sends figures, pictures and artifacts to a W&B run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.tracking.environment import is_offline
from agent.tracking.uploads import UploadQueue
from diffusion_core.config.metrics import goal_of
from diffusion_core.redact import redact, redacted
from diffusion_core.tracking import MODEL, STEP, Tracker, Upload

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

PATIENCE_S = 300.0
"""Seconds that a finished trial waits for uploads, unless WANDB_FINISH_TIMEOUT says otherwise."""


class WandbTracker(Tracker):
    """Send everything to a W&B run, online or into its offline file.

    Args:
        run: what ``wandb.init`` returned.
        first_step: the first step to log. The run has rows of earlier ones already.
        keep: number of versions of an artifact that may wait for their upload, besides the best one.
        after_upload: called with each artifact that was uploaded.
    """

    def __init__(
        self,
        run: Run,
        *,
        first_step: int = 0,
        keep: int = 2,
        after_upload: Callable[[Any], None] | None = None,
    ) -> None:
        self.run = run
        self._logged: dict[str, Any] = {}
        self.live = not is_offline(run)
        self.first_step = first_step
        self.after_upload = after_upload
        # Offline, keep the staged files: `wandb sync` reads them.
        self.uploads = UploadQueue(self._send, Path(run.settings.sync_dir) / "staged", keep, discard=self.live)
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        self._defined: set[str] = set()

    def log(self, row: Mapping[str, float | Path], step: int) -> None:
        """Send one row to W&B, unless the server has that step already."""
        if step >= self.first_step:
            for name in row.keys() - self._defined:
                # By its full name, so that the summary keeps the best value: of patterns that match, W&B applies any.
                if (goal := goal_of(name)) is not None and "*" not in name:
                    self.run.define_metric(name, step_metric=STEP, summary="min" if goal == "minimize" else "max")
            self._defined |= row.keys()
            # Commit at once: an uncommitted row is lost if this process dies.
            values = {STEP: step, **{name: _wandb_value(value) for name, value in row.items()}}
            self.run.log(values, step=step, commit=True)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Set figures in the run's summary."""
        self.run.summary.update(redacted(dict(figures)))

    def artifact(self, upload: Upload) -> None:
        """Upload a version of an artifact, or keep what would be uploaded."""
        self.uploads.put(upload)

    def _send(self, upload: Upload) -> None:
        import wandb

        artifact = wandb.Artifact(upload.name, type=upload.kind, metadata=redacted(dict(upload.metadata)))
        if upload.ttl_days is not None:
            artifact.ttl = timedelta(days=upload.ttl_days)
        for path in upload.files:
            # Read the staged file in place, and do not copy it to the cache.
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        logged = self.run.log_artifact(artifact, aliases=list(upload.aliases))
        if self.live:
            logged.wait()
            self._logged[upload.name] = logged
            if self.after_upload is not None:
                self.after_upload(logged)

    def use(self, name: str, kind: str = MODEL, files: Sequence[Path] = ()) -> None:
        """Record that the run uses an artifact, after the uploads that were queued before."""
        if self.live:  # Only a server knows other runs. Queue it: the artifact may still wait for its upload.
            self.uploads.then(f"lineage from {name}", lambda: self._use(name, kind, files))

    def _use(self, name: str, kind: str, files: Sequence[Path]) -> None:
        import wandb

        if files:
            artifact = wandb.Artifact(name, type=kind)
            for path in files:
                artifact.add_file(str(path), policy="mutable", skip_cache=True)
            self.run.use_artifact(artifact)
        elif name in self._logged:
            self.run.use_artifact(self._logged[name])
        else:
            self.run.use_artifact(name, type=kind)

    def alert(self, title: str, text: str) -> None:
        """Send an alert of level WARN."""
        self.run.alert(title, redact(text), level="WARN")

    def close(self, exit_code: int = 0) -> None:
        """Send what is left, within the run's finish_timeout.

        Raises:
            TimeoutError: if time ran out. The message names what was not sent.
        """
        left = self.uploads.close(self.run.settings.finish_timeout or PATIENCE_S)
        try:
            self.run.finish(exit_code=exit_code)
        except TimeoutError:
            left = ["history", *left]
        if left:
            raise TimeoutError(", ".join(left))


def _wandb_value(value: float | Path) -> Any:
    if not isinstance(value, Path):
        return value
    import wandb

    if value.suffix == ".gif":
        return wandb.Video(str(value), format="gif")
    return wandb.Image(str(value))
