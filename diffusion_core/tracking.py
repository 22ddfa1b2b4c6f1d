"""Where figures, pictures and checkpoints go: nowhere, into memory (tests), or to Weights & Biases.

``wandb`` is imported here and in ``agent/`` alone, and only when a run is started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffusion_core.figure_names import GOALS
from diffusion_core.uploads import Upload, UploadQueue

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

STEP = "step"
"""The key that every row carries, and the x axis of every plot: optimizer steps done."""

PATIENCE_S = 300.0
"""How long a trial that is over waits for what has not reached W&B yet, unless WANDB_FINISH_TIMEOUT says otherwise."""


class Tracker(Protocol):
    """What a trial tells the world.

    A row maps names to numbers, or to paths of pictures (``.png``) and animations (``.gif``).

    Attributes:
        live: whether artifacts reach others while training goes on; else it is enough to log them at the end.
    """

    live: bool

    def log(self, row: Mapping[str, float | Path], step: int) -> None:
        """One row of history; called once a logging interval."""

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Figures of the run as a whole."""

    def artifact(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        aliases: Sequence[str],
        metadata: Mapping[str, Any],
        ttl_days: int | None = None,
    ) -> None:
        """A versioned set of files; the files may be deleted once this returns, but not written to.

        Args:
            name: of which this is a version.
            kind: what it is.
            files: what it holds.
            aliases: what this version is called; an alias moves here from older versions.
            metadata: facts about it.
            ttl_days: after how many days the server may forget it; None: never.
        """

    def alert(self, title: str, text: str) -> None:
        """Something that somebody should look at."""

    def use(self, name: str, kind: str = "model", files: Sequence[Path] = ()) -> None:
        """An artifact that the run builds on, which lineage shows: one that there is, or one of these files."""

    def close(self, exit_code: int = 0) -> None:
        """Send what is left; afterwards nothing more may be logged."""


class NullTracker:
    """Keeps nothing: for trials without tracking, and for all processes but the first."""

    live = False

    def log(self, row: Mapping[str, float | Path], step: int) -> None:
        pass

    def summary(self, figures: Mapping[str, Any]) -> None:
        pass

    def artifact(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        aliases: Sequence[str],
        metadata: Mapping[str, Any],
        ttl_days: int | None = None,
    ) -> None:
        pass

    def use(self, name: str, kind: str = "model", files: Sequence[Path] = ()) -> None:
        pass

    def alert(self, title: str, text: str) -> None:
        pass

    def close(self, exit_code: int = 0) -> None:
        pass


@dataclass
class MemoryTracker:
    """Keeps everything in memory: for tests and notebooks."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    used: list[tuple[str, str]] = field(default_factory=list)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    exit_code: int | None = None
    live = True

    def log(self, row: Mapping[str, float | Path], step: int) -> None:
        self.rows.append({STEP: step, **row})

    def summary(self, figures: Mapping[str, Any]) -> None:
        self.figures.update(figures)

    def artifact(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        aliases: Sequence[str],
        metadata: Mapping[str, Any],
        ttl_days: int | None = None,
    ) -> None:
        self.artifacts.append(
            {
                "name": name,
                "type": kind,
                "aliases": list(aliases),
                "metadata": dict(metadata),
                "ttl_days": ttl_days,
                "files": {path.name: path.stat().st_size for path in files},
            }
        )

    def use(self, name: str, kind: str = "model", files: Sequence[Path] = ()) -> None:
        self.used.append((kind, name))

    def alert(self, title: str, text: str) -> None:
        self.alerts.append((title, text))

    def close(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code


class WandbTracker:
    """Sends everything to a W&B run (online, or into its offline file).

    Args:
        run: what ``wandb.init`` returned.
        first_step: the first step that the run has no row of; rows of earlier ones are there already.
        keep: how many versions of an artifact may wait for their upload, besides the best one.
        after_upload: called with each artifact that has arrived.
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
        self.live = not run.settings._offline
        self.first_step = first_step
        self.after_upload = after_upload
        # Offline, the files stay where they are until `wandb sync` reads them.
        self.uploads = UploadQueue(self._send, Path(run.settings.sync_dir) / "staged", keep, discard=self.live)
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        for name, goal in GOALS.items():
            run.define_metric(name, step_metric=STEP, summary="min" if goal == "minimize" else "max")

    def log(self, row: Mapping[str, float | Path], step: int) -> None:
        if step >= self.first_step:
            # Committed at once: a row that waited for the next one would be lost with this process.
            values = {STEP: step, **{name: _wandb_value(value) for name, value in row.items()}}
            self.run.log(values, step=step, commit=True)

    def summary(self, figures: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(figures))

    def artifact(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        aliases: Sequence[str],
        metadata: Mapping[str, Any],
        ttl_days: int | None = None,
    ) -> None:
        self.uploads.put(Upload(name, kind, tuple(files), tuple(aliases), dict(metadata), ttl_days))

    def _send(self, upload: Upload) -> None:
        import wandb

        artifact = wandb.Artifact(upload.name, type=upload.kind, metadata=dict(upload.metadata))
        if upload.ttl_days is not None:
            artifact.ttl = timedelta(days=upload.ttl_days)
        for path in upload.files:
            # Read where it is staged, and not copied into the cache once it is uploaded.
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        logged = self.run.log_artifact(artifact, aliases=list(upload.aliases))
        if self.live:
            logged.wait()
            self._logged[upload.name] = logged
            if self.after_upload is not None:
                self.after_upload(logged)

    def use(self, name: str, kind: str = "model", files: Sequence[Path] = ()) -> None:
        if self.live:  # Only a server knows of other runs. After all uploads before it, of which it may be one.
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
        self.run.alert(title, text, level="WARN")

    def close(self, exit_code: int = 0) -> None:
        """Send what is left, for no longer than the run's finish_timeout.

        Raises:
            TimeoutError: if that was not long enough; the message names what has not arrived.
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
