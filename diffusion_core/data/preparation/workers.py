"""Prepare many images in several processes, with a progress bar."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from diffusion_core.data.preparation.image import make_image
from diffusion_core.data.preparation.records import Job, Result, Settings
from diffusion_core.data.preparation.target import JOURNAL_FILE
from diffusion_core.signals import ignore_interrupts
from diffusion_core.terminal.progress import progress_of

CHUNK = 8
"""Images per task of a worker; small, because stopping waits for running tasks."""


def run(
    jobs: Sequence[Job], done: Mapping[str, Result], settings: Settings, target: Path, workers: int, *, write: bool
) -> list[Result]:
    """Run the jobs that are not in ``done``; returns the results of all jobs, in their order.

    An exception, such as KeyboardInterrupt, leaves all finished images in the journal.

    Raises:
        OSError: if TARGET cannot be written.
        BrokenProcessPool: if a worker was killed.
    """
    missing = [job for job in jobs if job.source not in done]
    results = dict(done)
    if missing:
        work = functools.partial(make_image, settings=settings, target=target, write=write)
        journal = (target / JOURNAL_FILE) if write else Path(os.devnull)
        with journal.open("a", encoding="utf-8") as lines:
            pool = ProcessPoolExecutor(min(workers, len(missing)), initializer=start_worker)
            try:
                fresh = pool.map(work, missing, chunksize=CHUNK)  # May fork: call it before a bar starts its thread.
                with progress_of("preparing", len(jobs), "image", shown=True, initial=len(done)) as bar:
                    for result in fresh:
                        results[result.source] = result
                        lines.write(json.dumps(asdict(result)) + "\n")
                        lines.flush()
                        bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
    return [results[job.source] for job in jobs]


def start_worker() -> None:
    """Let the parent decide about Ctrl-C, which reaches all processes of a terminal, and exit when it is killed."""
    ignore_interrupts()
    warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of large images.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
