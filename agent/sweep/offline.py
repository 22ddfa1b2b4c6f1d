"""Run a sweep without a server: what the engine of the core needs to know of W&B, and what is printed at the end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from agent.report import NAME, write_ended
from agent.sweep.file import SweepFile
from agent.tracking.environment import OFFLINE_SWEEP
from diffusion_core.machine.jobs import Launcher
from diffusion_core.messages import counted
from diffusion_core.search.offline import NothingWorks, OfflineSweep
from diffusion_core.search.results import CSV_FILE, JSON_FILE, summary
from diffusion_core.search.state import FAILED

PLOT_FILE = "results.png"
"""The plot of quality against cost in a sweep's folder."""


def offline_sweep(
    sweep: SweepFile, folder: Path, jobs: int = 1, launcher: Launcher | None = None, *, retry_failed: bool = False
) -> OfflineSweep:
    """Return a sweep whose trials record their runs offline: ``jobs`` processes at once, or what a launcher runs.

    Raises:
        SweepError: if the folder holds a sweep with another content, or a damaged one.
    """
    mode = "disabled" if os.environ.get("WANDB_MODE") == "disabled" else "offline"
    group = {"WANDB_MODE": mode, "WANDB_RUN_GROUP": sweep.name, OFFLINE_SWEEP: sweep.name}
    group["WANDB_SILENT"] = os.environ.get("WANDB_SILENT", "true")
    own = ("WANDB_RUN_ID", "WANDB_NAME")
    return OfflineSweep(
        sweep, folder, jobs, launcher, lambda trial: group | dict.fromkeys(own, trial), retry_failed=retry_failed
    )


def run_offline(coordinator: OfflineSweep, count: int | None) -> int:
    """Run an offline sweep, print its table, and write its report. Return the exit status."""
    sweep, folder = coordinator.sweep, coordinator.folder
    try:
        records = coordinator.run(count)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from here ({folder})", file=sys.stderr)
        return 130
    except NothingWorks as error:
        print(f"error: {error}", file=sys.stderr)
        records = coordinator.reader.ranked()
    print(f"\n{summary(sweep, records)}")
    print(f"\n{CSV_FILE}, {JSON_FILE}, sample grids and GIFs: {folder}/")
    print(f"to put it all on W&B: python -m agent.sync {folder}")
    write_ended(folder, folder / NAME, plot=folder / PLOT_FILE)
    failed = sum(record.state == FAILED for record in records)
    if failed:
        print(f"{counted(failed, 'trial')} failed; to run failed trials again, add --retry-failed to the same command")
    return 1 if failed else 0
