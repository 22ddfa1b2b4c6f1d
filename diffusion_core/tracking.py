"""Where figures, pictures and checkpoints go: the protocol, a tracker that keeps nothing, and one in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

STEP = "step"
"""The key that every row carries, and the x axis of every plot: optimizer steps done."""

BEST = "best"
"""The alias that a superseded upload may still be needed for."""

MODEL = "model"
"""Type of the artifacts that sampling needs; the name is ``model-RUN_ID``."""

STATE = "training-state"
"""Type of the artifacts that hold what resuming needs besides; the name is ``training-state-RUN_ID``."""


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
        """Do nothing."""

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Do nothing."""

    def artifact(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        aliases: Sequence[str],
        metadata: Mapping[str, Any],
        ttl_days: int | None = None,
    ) -> None:
        """Do nothing."""

    def use(self, name: str, kind: str = "model", files: Sequence[Path] = ()) -> None:
        """Do nothing."""

    def alert(self, title: str, text: str) -> None:
        """Do nothing."""

    def close(self, exit_code: int = 0) -> None:
        """Do nothing."""


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
        """Append the row, with its step."""
        self.rows.append({STEP: step, **row})

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Update the figures."""
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
        """Keep name, type, aliases and metadata, and a copy of the files' contents."""
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
        """Append (type, name)."""
        self.used.append((kind, name))

    def alert(self, title: str, text: str) -> None:
        """Append (title, text)."""
        self.alerts.append((title, text))

    def close(self, exit_code: int = 0) -> None:
        """Keep the exit status."""
        self.exit_code = exit_code
