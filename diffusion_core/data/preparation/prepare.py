"""Prepare all images of a source: skip what earlier calls did, run the rest, clean up, and write the report."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

from diffusion_core.data.preparation.records import InputError, Prepared, Settings, Source
from diffusion_core.data.preparation.report import build_report
from diffusion_core.data.preparation.target import (
    JOURNAL_FILE,
    REPORT_FILE,
    SETTINGS_FILE,
    read_journal,
    remove,
    still_valid,
    without_duplicates,
    write_journal,
)
from diffusion_core.data.preparation.workers import run
from diffusion_core.files import write_json


def prepare(source: Source, settings: Settings, target: Path, workers: int, *, write: bool) -> Prepared:
    """Run the jobs that no earlier call finished, and bring TARGET up to date.

    If it is interrupted, the same call continues from there.

    Args:
        source: the images.
        settings: settings of TARGET.
        target: the folder to write.
        workers: number of processes.
        write: False reads all images and does not change TARGET.

    Raises:
        InputError: if TARGET cannot be written, or a worker was killed.
    """
    old = read_journal(target / JOURNAL_FILE)
    done = still_valid(source.jobs, old, target)
    removed = 0
    try:
        if write:
            target.mkdir(parents=True, exist_ok=True)
            write_json(target / SETTINGS_FILE, asdict(settings))
        made = run(source.jobs, done, settings, target, workers, write=write)
        results = without_duplicates(made)
        report = build_report(settings, results, source)
        if write:
            remove(target, made, results)
            removed = remove(target, old, results)
            write_journal(target / JOURNAL_FILE, made)
            write_json(target / REPORT_FILE, report)
    except OSError as error:
        reason = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        raise InputError(
            f"TARGET = {str(target)!r}: {reason}; fix this and run the same command again to continue"
        ) from None
    except (BrokenProcessPool, MemoryError):
        raise InputError(
            f"--workers = {workers}: a worker was killed, perhaps for lack of memory; run the same command with fewer "
            "workers to continue"
        ) from None
    return Prepared(results, report, len(done), removed)
