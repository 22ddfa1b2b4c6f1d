"""Measure the cost of a trial outside training: a trial of one step on digits, in a new process."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row
from diffusion_core.run_folder import HISTORY_FILE

SUBJECT = "cold-trial"
FIRST_STEP_TARGET_S, FIRST_TRIAL_TARGET_S, TRIAL_TARGET_S = 6.0, 10.0, 6.0
ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.005
WORDS = ["--preset=digits", "--train.warmup_steps=0", "--log.every=1", "--log.progress=false"]


def environment(folder: Path, cache: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    own = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    return kept | own | {"DIFFUSION_SWEEPS_CACHE": str(cache)}


def first_step(folder: Path, cache: Path) -> float:
    """Return the seconds from the start of the process to its first row of history, right after the first step."""
    history = folder / "run" / HISTORY_FILE
    # Many steps, so that no evaluation, sampling or checkpoint comes before the first row.
    words = [*WORDS, "--train.steps=1000", f"--log.dir={folder / 'run'}"]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "agent", *words], cwd=folder, env=environment(folder, cache),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while not (history.is_file() and history.stat().st_size) and process.poll() is None:
        time.sleep(POLL_S)
    taken = time.perf_counter() - started
    process.kill()
    if process.wait() != -9:
        raise RuntimeError(f"the trial ended before its first step, with status {process.returncode}")
    return taken


def whole_trial(folder: Path, cache: Path) -> float:
    """Return the seconds of a trial of one step: imports, data, step, evaluation, images, checkpoint, W&B."""
    words = [*WORDS, "--train.steps=1", "--sample.every=0", "--eval.every=0", f"--log.dir={folder / 'run'}"]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "agent", *words], cwd=folder, env=environment(folder, cache), check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    return time.perf_counter() - started


def measure(options: Options) -> list[Row]:
    """Measure both, in a new folder each time. The first trial of a machine also trains the digits classifier."""
    rows = []
    whole = "whole trial of one step, digits: imports to the last artifact"
    for what, work, target, kept in (
        ("from the start of the process to the first step, digits", first_step, FIRST_STEP_TARGET_S, False),
        (f"{whole}; the first trial of a machine", whole_trial, FIRST_TRIAL_TARGET_S, False),
        (f"{whole}; every further trial", whole_trial, TRIAL_TARGET_S, True),
    ):
        times, used = [], []
        with tempfile.TemporaryDirectory() as shared:
            for index in range(options.rounds + 1):
                before = processor_seconds()
                with tempfile.TemporaryDirectory() as name:
                    times.append(work(Path(name), Path(shared if kept else name) / "cache"))
                used.append(processor_seconds() - before)
                options.say(
                    f"{'round ' + str(index) if index else 'warm-up'} of {options.rounds}: {times[-1]:.2f} s "
                    f"({used[-1]:.2f} s of processors)"
                )
        median, details = statistics.median(times[1:]), {"seconds": times[1:], "processor_seconds": used[1:]}
        rows.append(Row(SUBJECT, what, median, "s", target, at_least=False, details=details))
    return rows


def processor_seconds() -> float:
    """Return the time that processors spent on this process's children, which ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
