"""The tracker that sends figures, pictures and artifacts to a W&B run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.tracking.arrival import lacking
from agent.tracking.environment import is_offline
from diffusion_core.config.metrics import goal_of
from diffusion_core.messages import one_line
from diffusion_core.redact import redact, redacted
from diffusion_core.runs.recorded import read_table
from diffusion_core.runs.uploads import UploadQueue
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import LINEAGE, MODEL, STEP, Tracker, Upload

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

PATIENCE_S = 300.0
"""Seconds that a finished trial waits for uploads, unless WANDB_FINISH_TIMEOUT says otherwise."""

ARTIFACT_WITHIN_S = 3600
"""Seconds that the upload of one artifact may take."""


class WandbTracker(Tracker):
    """Send everything to a W&B run, online or into its offline file.

    Args:
        run: what ``wandb.init`` returned.
        first_step: the first step to log. The run has rows of earlier ones already.
        keep: number of versions of an artifact that may wait for their upload, besides the best one.
        after_upload: called with each artifact that was uploaded.
        online: whether the run was meant to be online. It is recorded offline if W&B did not answer.
    """

    def __init__(
        self,
        run: Run,
        *,
        first_step: int = 0,
        keep: int = 2,
        after_upload: Callable[[Any], None] | None = None,
        online: bool = False,
    ) -> None:
        self.run = run
        self.online = online
        self.broken = ""
        """Why W&B's client does not take any more; empty while it does."""
        self._logged: dict[str, Any] = {}
        self._unused: list[str] = []
        self.live = not is_offline(run)
        self.first_step = first_step
        self.last_step = first_step - 1 if first_step > 0 else None
        self.after_upload = after_upload
        # Offline, keep the staged files: `wandb sync` reads them.
        self.uploads = UploadQueue(self._send, Path(run.settings.sync_dir) / "staged", keep, discard=self.live)
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        self._defined: set[str] = set()

    def log(self, row: Mapping[str, float | Path], step: int) -> None:
        """Send one row to W&B, unless the server has that step already."""
        if step >= self.first_step:
            self.last_step = step
            self._tell(lambda: self._log(row, step))

    def _log(self, row: Mapping[str, float | Path], step: int) -> None:
        for name in row.keys() - self._defined:
            # By its full name, so that the summary keeps the best value: of patterns that match, W&B applies any.
            if (goal := goal_of(name)) is not None and "*" not in name:
                self.run.define_metric(name, step_metric=STEP, summary="min" if goal == "minimize" else "max")
        self._defined |= row.keys()
        # Commit at once: an uncommitted row is lost if this process dies.
        self.run.log({STEP: step, **{name: _wandb_value(value) for name, value in row.items()}}, step=step, commit=True)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Set figures in the run's summary."""
        self._tell(lambda: self.run.summary.update(redacted(dict(figures))))

    def _tell(self, send: Callable[[], object]) -> None:
        """Tell W&B's client something. A client that broke must not stop training: history is on the disk as well."""
        if not self.broken:
            try:
                send()
            except Exception as error:
                self.broken = one_line(error)
                say(f"W&B: its client has broken ({self.broken}); what is missing is sent at the end")

    def artifact(self, *uploads: Upload) -> None:
        """Upload versions of artifacts, or keep what would be uploaded."""
        self.uploads.put(*uploads)

    def _send(self, uploads: Sequence[Upload]) -> None:
        logged = [self._log_artifact(upload) for upload in uploads]
        if self.live and self.after_upload is not None:
            for artifact in logged:  # Only now: until both halves have arrived, an older pair is needed.
                self.after_upload(artifact)

    def _log_artifact(self, upload: Upload) -> Any:
        import wandb

        artifact = wandb.Artifact(upload.name, type=upload.kind, metadata=redacted(dict(upload.metadata)))
        if upload.ttl_days is not None:
            artifact.ttl = timedelta(days=upload.ttl_days)
        for path in upload.files:
            # Read the staged file in place, and do not copy it to the cache.
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        logged = self.run.log_artifact(artifact, aliases=list(upload.aliases))
        if self.live:
            logged.wait(ARTIFACT_WITHIN_S)
            self._logged[upload.name] = logged
        return logged

    def use(self, name: str, kind: str = MODEL, files: Sequence[Path] = ()) -> None:
        """Record that the run uses an artifact, after the uploads that were queued before."""
        if self.live:  # Queue it: the artifact may still wait for its upload.
            self.uploads.then(f"{LINEAGE}{name}", lambda: self._use(name, kind, files))
        else:  # Only a server knows other runs.
            self._unused.append(f"{LINEAGE}{name}")

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
        self._tell(lambda: self.run.alert(title, redact(text), level="WARN"))

    def close(self, exit_code: int = 0) -> list[str]:
        """Send what is left, within the run's finish_timeout. Return the names of missing data."""
        patience_s = 0.0 if self.broken else self.run.settings.finish_timeout or PATIENCE_S
        left = [*self.uploads.close(patience_s), *self._unused]
        if not self.broken:
            with contextlib.suppress(TimeoutError):
                self._tell(lambda: self.run.finish(exit_code=exit_code))
        if self.broken:
            import wandb

            with contextlib.suppress(Exception):
                wandb.teardown()  # Have W&B forget its dead process, or it would print a traceback at exit.
            return ["history", *left]
        return [*(lacking(self.run, self.last_step) if self.live else []), *left]


def _wandb_value(value: float | Path) -> Any:
    if not isinstance(value, Path):
        return value
    import wandb

    if value.suffix == ".gif":
        return wandb.Video(str(value), format="gif")
    if value.suffix == ".json":
        columns, rows = read_table(value, wandb.Image)
        return wandb.Table(columns=list[str | int](columns), data=rows)
    return wandb.Image(str(value))
