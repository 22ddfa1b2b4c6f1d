"""Measure training on digits beside other busy processes, against a fair share of the quiet machine."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row
from diffusion_core.machine.sharing import usable_cores
from diffusion_core.run_folder import HISTORY_FILE, read_history

SUBJECT = "contention"
TARGET = 0.6
ROOT = Path(__file__).resolve().parents[2]
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


def fair_share(cores: int, others: int) -> float:
    """Return the cores that one process should get beside others that use one each, if the scheduler is fair."""
    return max(cores - others, cores / (others + 1))


def steps_per_second(seconds: float, others: int) -> float:
    """Return the speed of a trial beside other processes, which run already when it starts."""
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
    """Measure beside one and two busy processes, in turns with the quiet machine."""
    seconds, cores = SHORT_SECONDS if options.short else SECONDS, usable_cores()
    found: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for _ in range(options.rounds):
        for others, speeds in found.items():
            speeds.append(steps_per_second(seconds, others))
    quiet = statistics.median(found[0])
    rows = []
    for others in (1, 2):
        fair = quiet * fair_share(cores, others) / cores
        speed = statistics.median(found[others])
        rows.append(
            Row(
                SUBJECT,
                f"training on digits beside {others} busy process{'es' if others > 1 else ''}, of a fair share",
                speed / fair,
                target=TARGET,
                ours=f"{speed:.3g} steps/s",
                peer=f"{fair:.3g} steps/s",
                details={"cores": cores, "steps_per_second": {str(count): speeds for count, speeds in found.items()}},
            )
        )
    return rows
