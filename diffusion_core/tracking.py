"""Where figures, pictures and checkpoints go: a tracker's interface, one that ignores everything, and one in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEP = "step"
"""The key of every row for the number of optimizer steps done; the x axis of every plot."""

BEST = "best"
"""The alias of an artifact's best version. An upload with it is sent even if newer ones wait."""

MODEL = "model"
"""Type of the artifacts with what sampling needs; they are named ``model-RUN_ID``."""

STATE = "training-state"
"""Type of the artifacts with what resuming needs as well; they are named ``training-state-RUN_ID``."""

LINEAGE = "lineage from "
"""What is missing if W&B was not told that a run uses an artifact: this, and the artifact's name."""


@dataclass(frozen=True)
class Upload:
    """A version of an artifact: a set of files with a name.

    Attributes:
        name: the artifact's name.
        kind: the artifact's type.
        files: the files of this version.
        aliases: names of this version. An alias moves here from older versions.
        metadata: facts about this version, as JSON.
        ttl_days: days until the server may delete it. None keeps it.
    """

    name: str
    kind: str
    files: Sequence[Path]
    aliases: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    ttl_days: int | None = None


class Tracker:
    """Receives what a trial records. This base class ignores all of it.

    A row maps names to numbers, or to paths of pictures (``.png``), animations (``.gif``) and tables (``.json``: a list
    of equal objects, whose ``image`` is a PNG in base64).

    Attributes:
        live: whether uploads reach other machines while training runs. If not, log them once at the end.
    """

    live = False

    def log(self, row: Mapping[str, float | Path], step: int) -> None:
        """Record one row of history; called once per logging interval."""

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Record figures of the run as a whole."""

    def artifact(self, *uploads: Upload) -> None:
        """Record versions of artifacts that are of use together only. The caller may then delete their files."""

    def use(self, name: str, kind: str = MODEL, files: Sequence[Path] = ()) -> None:
        """Record that the run uses an artifact: an existing one, or one that consists of ``files``."""

    def alert(self, title: str, text: str) -> None:
        """Notify the user."""

    def close(self, exit_code: int = 0) -> list[str]:
        """Finish all uploads. Return the names of missing data. Record nothing afterwards."""
        return []


class NullTracker(Tracker):
    """Records nothing: for trials without tracking, and for all processes but the first."""


@dataclass
class MemoryTracker(Tracker):
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

    def artifact(self, *uploads: Upload) -> None:
        """Append a description of each version."""
        self.artifacts += [
            {
                "name": upload.name,
                "type": upload.kind,
                "aliases": list(upload.aliases),
                "metadata": dict(upload.metadata),
                "ttl_days": upload.ttl_days,
                "files": {path.name: path.stat().st_size for path in upload.files},
            }
            for upload in uploads
        ]

    def use(self, name: str, kind: str = MODEL, files: Sequence[Path] = ()) -> None:
        """Append (type, name)."""
        self.used.append((kind, name))

    def alert(self, title: str, text: str) -> None:
        """Append (title, text)."""
        self.alerts.append((title, text))

    def close(self, exit_code: int = 0) -> list[str]:
        """Keep the exit status."""
        self.exit_code = exit_code
        return []
