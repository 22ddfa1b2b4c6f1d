"""A script in two processes on one machine, with the variables of a launcher, by gloo."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import Forks

ROOT = Path(__file__).parents[2]
ENDS_WITHIN_S = 120


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def variables(rank: int, port: int, count: int) -> dict[str, str]:
    """The variables of a launcher for one of the processes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    return place | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))


def run_ranks(
    forks: Forks, folder: Path, words: Sequence[str], *, env: Sequence[dict[str, str]] = ({}, {})
) -> list[tuple[int, str, str]]:
    """Run ``python WORDS`` in two processes, each with variables of its own. Return statuses, outputs and errors.

    Raises:
        TimeoutExpired: if they hang. They are killed then.
    """
    port = free_port()
    own = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    own |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    started = [
        subprocess.Popen(
            [forks.interpreter, *words],
            cwd=folder,
            env=own | variables(rank, port, len(env)) | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, more in enumerate(env)
    ]
    try:
        ended = [process.communicate(timeout=ENDS_WITHIN_S) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(started, ended, strict=True)]
