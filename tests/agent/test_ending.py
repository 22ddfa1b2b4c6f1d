"""Every way in which a trial may end: exit status, what W&B is told, and what is printed."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from typing import Any

import pytest

from agent.ending import Ending, ending_of, lost_peer
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError
from diffusion_core.data.datasets import DataError
from diffusion_core.training.callbacks import DIVERGED
from diffusion_core.training.stopping import Stopped
from diffusion_core.training.trainer import TrainingDiverged

FOLDER = Path("runs/x")
PREEMPTED = "stopped by SIGTERM; continue with the same command and --log.dir=runs/x"
ENDED = "stopped by SIGTERM, as W&B asked; the run is over"
FULL = "error: 'file': No space left on device; free some space, and continue with --log.dir=runs/x"
QUOTA = "error: cannot write; free some space, and continue with --log.dir=runs/x"
INTERRUPTED = "interrupted; continue from the last checkpoint with --log.dir=runs/x"


def unwritten(code: int) -> CheckpointError:
    error = CheckpointError("cannot write")
    error.errno = code
    return error


@pytest.mark.parametrize(
    ("error", "status", "told", "message", "more"),
    [
        (None, 0, 0, "", {}),
        (
            Stopped(signal.SIGTERM),
            *(143, 143, PREEMPTED, {"everywhere": False, "preempted": True, "together": False}),
        ),
        (Stopped(signal.SIGTERM, together=True), 143, 143, PREEMPTED, {"everywhere": False, "preempted": True}),
        (Stopped(signal.SIGTERM, ended=True, together=True), 0, 143, ENDED, {"everywhere": False}),
        (ConfigError("a = 1: wrong"), 2, 2, "error: a = 1: wrong", {"together": False}),
        (DataError("no images"), 2, 2, "error: no images", {"together": False}),
        (TrainingDiverged("loss = nan"), 1, 1, "error: loss = nan", {"together": False, "alert": DIVERGED}),
        (CheckpointError("damaged"), 1, 1, "error: damaged", {"together": False}),
        (OSError(errno.ENOSPC, "No space left on device", "file"), 74, 74, FULL, {"together": False}),
        (unwritten(errno.EDQUOT), 74, 74, QUOTA, {"together": False}),
        (unwritten(errno.EIO), 1, 1, "error: cannot write", {"together": False}),
        (KeyboardInterrupt(), 130, 130, INTERRUPTED, {"together": False, "hurry": True}),
    ],
)
def test_a_known_ending(
    error: BaseException | None, status: int, told: int, message: str, more: dict[str, Any]
) -> None:
    assert ending_of(error, FOLDER) == Ending(status, told, message, **more)


@pytest.mark.parametrize("kind", [RuntimeError, PermissionError, TimeoutError])
def test_an_unknown_error_keeps_its_traceback_and_may_come_of_a_lost_process(kind: type[Exception]) -> None:
    try:
        raise kind("broken")
    except Exception as error:
        ending = ending_of(error, FOLDER)
    assert (ending.status, ending.told, ending.known, ending.together) == (1, 1, False, False)
    assert ending.message.startswith("Traceback")
    assert ending.message.endswith(f"{kind.__name__}: broken")


def test_a_lost_process_leaves_little_time() -> None:
    assert lost_peer("process 1 ended") == Ending(1, 1, "error: process 1 ended", together=False, hurry=True)
