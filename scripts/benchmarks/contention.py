"""Measure training on digits beside other busy processes, and with a quota of one core, against a fair share."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row
from diffusion_core.machine.sharing import usable_cores
from diffusion_core.run_folder import HISTORY_FILE, read_history

SUBJECT = "contention"
TARGET = 0.6
QUIET, BESIDE, QUOTA = (
    "on the quiet machine",
    ("beside 1 busy process", "beside 2 busy processes"),
    "with a quota of 1 core",
)
ROOT = Path(__file__).resolve().parents[2]
GROUPS = Path("/sys/fs/cgroup")
PERIOD_US = 100_000
"""The period of a quota, by default: so many microseconds of it are one core."""
SECONDS, SHORT_SECONDS = 20.0, 4.0
WORDS = ["--preset=digits", "--train.steps=100000", "--train.warmup_steps=0", "--log.every=1", "--log.progress=false",
         "--eval.every=0", "--sample.every=0", "--checkpoint.every=0"]  # fmt: skip


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run so many processes that never wait."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextlib.contextmanager
def one_core() -> Iterator[Callable[[], None] | None]:
    """Make a control group with a quota of one core, as containers have; remove it at the end.

    Yields:
        A function with which a process joins it; None if this machine does not allow it.
    """
    group = _group_of_one_core()
    if group is None:
        yield None
        return

    def join() -> None:
        with (group / "cgroup.procs").open("r+", encoding="ascii") as opened:
            opened.write(str(os.getpid()))

    try:
        yield join
    finally:
        end = time.monotonic() + 30.0
        while (group / "cgroup.procs").read_text(encoding="ascii") and time.monotonic() < end:
            time.sleep(0.05)
        group.rmdir()


def _group_of_one_core() -> Path | None:
    """Return a new control group of version 1 or 2 with a quota of one core; None if it cannot be made."""
    for quota in ("cpu/contention-{}/cpu.cfs_quota_us", "contention-{}/cpu.max"):
        file = GROUPS / quota.format(os.getpid())
        with contextlib.suppress(OSError):
            file.parent.mkdir()
            try:
                with file.open("r+", encoding="ascii") as opened:  # It is there if the group controls processors.
                    opened.write(str(PERIOD_US))
            except OSError:
                file.parent.rmdir()
                raise
            return file.parent
    return None


def fair_share(cores: int, others: int) -> float:
    """Return the cores that one process should get beside others that use one each, if the scheduler is fair."""
    return max(cores - others, cores / (others + 1))


def steps_per_second(seconds: float, others: int, join: Callable[[], None] | None = None) -> float:
    """Return the speed of a trial beside other processes, which run already when it starts.

    ``join`` is called in the trial's process before anything else.
    """
    with tempfile.TemporaryDirectory() as name, busy(others):
        time.sleep(1.0)
        folder = Path(name) / "run"
        kept = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
        trial = subprocess.Popen(
            [sys.executable, "-m", "agent", *WORDS, f"--log.dir={folder}"],
            cwd=name,
            env=kept | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=join,
        )
        try:
            while not (folder / HISTORY_FILE).is_file() or not (first := len(read_history(folder))):
                time.sleep(0.05)
            began = time.perf_counter()
            time.sleep(seconds)
            return (len(read_history(folder)) - first) / (time.perf_counter() - began)
        finally:
            trial.kill()
            trial.wait()


def measure(options: Options) -> list[Row]:
    """Measure beside one and two busy processes, and with a quota of one core, in turns with the quiet machine."""
    seconds, cores = SHORT_SECONDS if options.short else SECONDS, usable_cores()
    found: dict[str, list[float]] = {QUIET: []}
    with one_core() as join:
        for _ in range(options.rounds):
            for others, where in enumerate((QUIET, *BESIDE)):
                found.setdefault(where, []).append(steps_per_second(seconds, others))
            if join is not None:
                found.setdefault(QUOTA, []).append(steps_per_second(seconds, 0, join))
    speeds = {where: statistics.median(each) for where, each in found.items()}
    details = {"cores": cores, "steps_per_second": found}
    fair = {where: speeds[QUIET] * fair_share(cores, others) / cores for others, where in enumerate(BESIDE, 1)}
    fair[QUOTA] = speeds[QUIET] / cores
    return [_row(where, speeds.get(where), share, details) for where, share in fair.items()]


def _row(where: str, speed: float | None, fair: float, details: dict[str, Any]) -> Row:
    what = f"training on digits {where}, of a fair share"
    if speed is None:
        return Row(SUBJECT, what, None, target=TARGET, note="control groups cannot be made here", details=details)
    ours, peer = f"{speed:.3g} steps/s", f"{fair:.3g} steps/s"
    return Row(SUBJECT, what, speed / fair, target=TARGET, ours=ours, peer=peer, details=details)
