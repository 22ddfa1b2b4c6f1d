"""Where figures, pictures and checkpoints go: nowhere, into memory (tests), or to Weights & Biases.

``wandb`` is imported here and in ``agent/`` alone, and only when a run is started.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffusion_core.figure_names import GOALS

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

STEP = "step"
"""The key that every row carries, and the x axis of every plot: optimizer steps done."""


class Tracker(Protocol):
    """What a trial tells the world.

    A row maps names to numbers, or to paths of pictures (``.png``) and animations (``.gif``).
    """

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
    ) -> None:
        """A versioned set of files; the files may be deleted once this returns."""

    def use(self, name: str, kind: str = "model", files: Sequence[Path] = ()) -> None:
        """An artifact that the run builds on, which lineage shows: one that there is, or one of these files."""

    def close(self, exit_code: int = 0) -> None:
        """Send what is left; afterwards nothing more may be logged."""


class NullTracker:
    """Keeps nothing: for trials without tracking, and for all processes but the first."""

    def log(self, row: Mapping[str, float | Path], step: int) -> None:
        pass

    def summary(self, figures: Mapping[str, Any]) -> None:
        pass

    def artifact(
        self, name: str, kind: str, files: Sequence[Path], aliases: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        pass

    def use(self, name: str, kind: str = "model", files: Sequence[Path] = ()) -> None:
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
    exit_code: int | None = None

    def log(self, row: Mapping[str, float | Path], step: int) -> None:
        self.rows.append({STEP: step, **row})

    def summary(self, figures: Mapping[str, Any]) -> None:
        self.figures.update(figures)

    def artifact(
        self, name: str, kind: str, files: Sequence[Path], aliases: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        self.artifacts.append(
            {
                "name": name,
                "type": kind,
                "aliases": list(aliases),
                "metadata": dict(metadata),
                "files": {path.name: path.stat().st_size for path in files},
            }
        )

    def use(self, name: str, kind: str = "model", files: Sequence[Path] = ()) -> None:
        self.used.append((kind, name))

    def close(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code


class WandbTracker:
    """Sends everything to a W&B run (online, or into its offline file).

    Args:
        run: what ``wandb.init`` returned.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._logged: dict[str, Any] = {}
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        for name, goal in GOALS.items():
            run.define_metric(name, step_metric=STEP, summary="min" if goal == "minimize" else "max")

    def log(self, row: Mapping[str, float | Path], step: int) -> None:
        self.run.log({STEP: step, **{name: _wandb_value(value) for name, value in row.items()}}, step=step)

    def summary(self, figures: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(figures))

    def artifact(
        self, name: str, kind: str, files: Sequence[Path], aliases: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        import wandb

        artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata))
        for path in files:
            # Staged as a copy, since older checkpoints are deleted while uploads go on; no second copy in the cache.
            artifact.add_file(str(path), policy="mutable", skip_cache=True)
        self._logged[name] = self.run.log_artifact(artifact, aliases=list(aliases))

    def use(self, name: str, kind: str = "model", files: Sequence[Path] = ()) -> None:
        if self.run.offline:  # Only a server knows of other runs.
            return
        import wandb

        if files:
            artifact = wandb.Artifact(name, type=kind)
            for path in files:
                artifact.add_file(str(path), policy="mutable", skip_cache=True)
            self.run.use_artifact(artifact)
        elif name in self._logged:  # Its own, which may still be on its way.
            self.run.use_artifact(self._logged[name].wait())
        else:
            try:
                self.run.use_artifact(name, type=kind)
            except (wandb.errors.Error, ValueError) as error:  # An arrow missing in a graph is no reason to lose a run.
                print(f"W&B: no lineage from {name}: {' '.join(str(error).split())[:200]}", file=sys.stderr)

    def close(self, exit_code: int = 0) -> None:
        self.run.finish(exit_code=exit_code)


def _wandb_value(value: float | Path) -> Any:
    if not isinstance(value, Path):
        return value
    import wandb

    if value.suffix == ".gif":
        return wandb.Video(str(value), format="gif")
    return wandb.Image(str(value))
