"""How a trial ended: one place that maps every outcome to an exit status, a message, and what W&B is told."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

from agent.command import UNUSABLE
from agent.tracking.artifacts import NotDownloaded
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError
from diffusion_core.data.datasets import DataError
from diffusion_core.files import DISK_FULL
from diffusion_core.machine.jobs import NO_SPACE, OTHER_INPUT
from diffusion_core.redact import redact
from diffusion_core.runs.inputs import OtherInput
from diffusion_core.training.callbacks import DIVERGED
from diffusion_core.training.stopping import Stopped
from diffusion_core.training.trainer import TrainingDiverged

FAILED = 1
UNSENT = 75
"""Exit status when W&B has not received something, or not handed it out: try again (EX_TEMPFAIL of sysexits.h)."""

INTERRUPTED = 130


@dataclass(frozen=True)
class Ending:
    """How a trial ended on one of its processes.

    Attributes:
        status: exit status of this process.
        told: exit status that W&B is told. An agent counts failed processes; W&B shows how the run ended.
        message: text for stderr; empty if there is nothing to say.
        everywhere: whether each process prints the message, or the first one only.
        alert: title of an alert with the message; None: no alert.
        preempted: whether the run is to be resumed elsewhere.
        together: whether all processes ended alike. If not, others may hang in a collective operation.
        hurry: whether there is little time left.
        known: whether the cause is known. If not, the death of another process may be the cause.
    """

    status: int = 0
    told: int = 0
    message: str = ""
    everywhere: bool = True
    alert: str | None = None
    preempted: bool = False
    together: bool = True
    hurry: bool = False
    known: bool = True


def lost_peer(loss: str) -> Ending:
    """The ending after another process of the trial died."""
    return Ending(FAILED, FAILED, f"error: {loss}", together=False, hurry=True)


def ending_of(error: BaseException | None, folder: Path | None) -> Ending:
    """Return how a trial ended.

    Args:
        error: what it raised; None: it finished.
        folder: the run's folder, if it is known, for messages.
    """
    if error is None:
        return Ending()
    if isinstance(error, KeyboardInterrupt):  # A second signal: do not wait.
        text = f"interrupted; continue from the last checkpoint with --log.dir={folder}"
        return Ending(INTERRUPTED, INTERRUPTED, text, together=False, hurry=True)
    if isinstance(error, Stopped):
        code, together = error.signal_code, error.together
        if error.ended:  # An agent gives up after a few failures, so exit with success.
            return Ending(0, code, f"{error}, as W&B asked; the run is over", everywhere=False, together=together)
        text = f"{error}; continue with the same command and --log.dir={folder}"
        return Ending(code, code, text, everywhere=False, preempted=True, together=together)
    if isinstance(error, NotDownloaded):
        text = f"error: {error}"
        return Ending(UNSENT, UNSENT, text, alert="Checkpoint not downloaded", preempted=True, together=False)
    if isinstance(error, OtherInput):
        return Ending(OTHER_INPUT, OTHER_INPUT, f"error: {error}", together=False)
    if isinstance(error, ConfigError | DataError):
        return Ending(UNUSABLE, UNUSABLE, f"error: {error}", together=False)
    if isinstance(error, TrainingDiverged):
        return Ending(FAILED, FAILED, f"error: {error}", alert=DIVERGED, together=False)
    if isinstance(error, OSError | CheckpointError) and error.errno in DISK_FULL:
        text = f"{str(error.filename or folder)!r}: {error.strerror}" if isinstance(error, OSError) else str(error)
        text = f"error: {text}; free some space, and continue with --log.dir={folder}"
        return Ending(NO_SPACE, NO_SPACE, text, together=False)
    if isinstance(error, CheckpointError):
        return Ending(FAILED, FAILED, f"error: {error}", together=False)
    text = redact("".join(traceback.format_exception(error)).rstrip())
    return Ending(FAILED, FAILED, text, together=False, known=False)
