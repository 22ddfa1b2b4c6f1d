"""All of it in order: what earlier calls did is kept, the rest is made, and the report is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_core.preparation.records import InputError, Job, Result, Settings
from diffusion_core.preparation.report import summary
from diffusion_core.preparation.target import (
    JOURNAL_FILE,
    REPORT_FILE,
    SETTINGS_FILE,
    read_journal,
    remove,
    still_valid,
    without_duplicates,
    write_journal,
    write_json,
)
from diffusion_core.preparation.workers import run


@dataclass(frozen=True)
class Prepared:
    """What a call came to.

    Attributes:
        results: what became of every image, in the order of the jobs.
        report: what stands in the report file.
        done_before: how many of the results are an earlier call's.
        removed: how many images of an earlier call are gone, since their sources have changed or gone.
    """

    results: list[Result]
    report: dict[str, Any]
    done_before: int
    removed: int

    @property
    def kept(self) -> int:
        return sum(not result.dropped for result in self.results)


def prepare(
    jobs: Sequence[Job], ignored: Mapping[str, int], settings: Settings, target: Path, workers: int, *, write: bool
) -> Prepared:
    """Do the jobs that no earlier call has done, and make TARGET what all of them come to.

    Args:
        jobs: every image that there is, sorted.
        ignored: how many files were passed over, by kind; for the report.
        settings: how TARGET looks.
        target: the folder to make.
        workers: processes.
        write: False reads all images and leaves TARGET as it is.

    Raises:
        InputError: if TARGET cannot be written, or a worker was killed.
        Stopped: if a signal came; the same call goes on from there.
    """
    old = read_journal(target / JOURNAL_FILE)
    done = still_valid(jobs, old, target)
    removed = 0
    try:
        if write:
            target.mkdir(parents=True, exist_ok=True)
            write_json(target / SETTINGS_FILE, asdict(settings))
        made = run(jobs, done, settings, target, workers, write=write)
        results = without_duplicates(made)
        report = summary(settings, results, ignored)
        if write:
            remove(target, made, results)
            removed = remove(target, old, results)
            write_journal(target / JOURNAL_FILE, made)
            write_json(target / REPORT_FILE, report)
    except OSError as error:
        reason = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        raise InputError(f"TARGET = {str(target)!r}: {reason}; put that right, and the same command goes on") from None
    except (BrokenProcessPool, MemoryError):
        raise InputError(
            f"--workers = {workers}: a worker was killed, perhaps for want of memory; try fewer, the same command "
            "goes on from here"
        ) from None
    return Prepared(results, report, len(done), removed)
