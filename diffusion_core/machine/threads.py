"""Set up a process before PyTorch is imported: the number of its threads, and its garbage collector.

OpenMP's threads wait for each other thousands of times in a training step. On a core that another process uses as well,
each wait costs a time slice: training digits on two cores beside one busy process was 40 times slower with two threads
than with one. And OpenMP's threads spin while they wait, which takes the cores from all others.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_core.machine.sharing import usable_cores

THREADS = "OMP_NUM_THREADS"
SPIN = "GOMP_SPINCOUNT"
LOOKS, LOOK_EVERY_S = 5, 0.02
"""How often and how far apart the number of busy processes is looked at."""


def settle_threads() -> str:
    """Set the environment so that PyTorch uses the cores that are free, and waits without spinning.

    Set variables win. It has an effect only before PyTorch is imported in this process. The number of threads decides
    the last bits of sums, so a run that resumes keeps it (:mod:`diffusion_core.training.checkpoints`).

    Returns:
        What was chosen, in words; empty if the user chose, or PyTorch is there already.
    """
    if THREADS in os.environ or "torch" in sys.modules:
        return ""
    os.environ.setdefault(SPIN, "0")
    cores, busy = usable_cores(), busy_elsewhere()
    free = max(1, min(cores, (os.cpu_count() or 1) - busy))
    os.environ[THREADS] = str(free)
    why = f", since other processes are busy ({THREADS}={cores} uses all)" if free < cores else ""
    return f"computing with {free} of {cores} cores{why}"


@contextmanager
def uncollected(package: str) -> Iterator[None]:
    """Import a package inside, without garbage collection. From then on, the collector leaves its objects alone.

    Modules stay until the process ends. The collector would look through PyTorch's a dozen times while they are
    imported, and again and again in training, which takes a second of a short trial.

    Args:
        package: name of a package or module. If it is imported already, no objects are exempted: by now there may be
            models among them.
    """
    enabled, is_first = gc.isenabled(), package not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first and package in sys.modules:
            gc.freeze()
        if enabled:
            gc.enable()


def busy_elsewhere() -> int:
    """Return how many threads of other processes want to run now: the median over a tenth of a second."""
    seen = []
    for _ in range(LOOKS):
        try:
            running = int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):  # Not Linux.
            return 0
        seen.append(max(0, running - 1))  # Without this process.
        time.sleep(LOOK_EVERY_S)
    return sorted(seen)[LOOKS // 2]
