"""Notice that the program that started a trial is gone: an agent, a launcher of several processes, a sweep.

Nobody would read the trial's result then, and its machine would go on working. Only programs that wait for a trial are
watched: a shell, a terminal or a batch system may end before it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import PurePath

import psutil  # type: ignore[import-untyped]

LOOK_EVERY_S = 1.0
JOB = "diffusion_core.machine.job"


def is_launcher(words: Sequence[str]) -> bool:
    """Return whether a command line is one of a program that starts trials and waits for them."""
    names = [PurePath(word).name for word in words]
    pairs = set(pairwise(names))
    return bool(
        {("wandb", "agent"), ("wb", "agent"), ("accelerate", "launch"), ("-m", "agent.sweep"), ("-m", JOB)} & pairs
        or {"torchrun", "torch.distributed.run", "accelerate-launch", "accelerate.commands.launch"} & set(names)
    )


def launchers() -> list[psutil.Process]:
    """Return the programs that started this process, directly or not, and wait for it."""
    found = []
    for process in psutil.Process().parents():
        try:
            if is_launcher(process.cmdline()):
                found.append(process)
        except psutil.Error:  # It has just ended, or belongs to another user.
            continue
    return found


def is_gone(process: psutil.Process) -> bool:
    """Return whether a process has ended. A process that took over its number is another one."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def watch_launchers(notice: Callable[[int], None]) -> None:
    """Call ``notice`` once, on a thread, as soon as a launcher of this process has ended; it is told its process id."""
    watched = launchers()
    if not watched:
        return

    def watch() -> None:
        while not (gone := [process for process in watched if is_gone(process)]):
            time.sleep(LOOK_EVERY_S)
        notice(gone[0].pid)

    threading.Thread(target=watch, name="launchers", daemon=True).start()
