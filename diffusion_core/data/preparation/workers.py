"""Many images in several processes, with a progress bar; a signal stops them between two images."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffusion_core.data.preparation.image import make_image
from diffusion_core.data.preparation.records import Job, Result, Settings
from diffusion_core.data.preparation.target import JOURNAL_FILE

CHUNK = 8
"""Images a worker takes at a time: few, since stopping waits for them."""


class Stopped(Exception):
    """A signal asked to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(
    jobs: Sequence[Job], done: Mapping[str, Result], settings: Settings, target: Path, workers: int, *, write: bool
) -> list[Result]:
    """Do the jobs that are not done, in several processes; the results of all, in the order of the jobs.

    Raises:
        Stopped: if a signal came; what is done is in the journal.
        OSError: if TARGET cannot be written.
        BrokenProcessPool: if a worker was killed.
    """
    missing = [job for job in jobs if job.source not in done]
    results: list[Result] = []
    if not missing:
        return [done[job.source] for job in jobs]
    work = functools.partial(make_image, settings=settings, target=target, write=write)
    journal = (target / JOURNAL_FILE) if write else Path(os.devnull)
    with stop_requests() as requests, journal.open("a", encoding="utf-8") as lines:
        pool = ProcessPoolExecutor(min(workers, len(missing)), initializer=start_worker)
        try:
            fresh = pool.map(work, missing, chunksize=CHUNK)  # Before the bar, which starts a thread: this may fork.
            with tqdm(None, "preparing", len(jobs), unit="image", initial=len(done), mininterval=0.5) as bar:
                for job in jobs:
                    if job.source in done:
                        results.append(done[job.source])
                        continue
                    results.append(next(fresh))
                    lines.write(json.dumps(asdict(results[-1])) + "\n")
                    lines.flush()
                    bar.update()
                    if requests:
                        raise Stopped(requests[0])
        except BrokenProcessPool:
            if requests:  # The signal went to the workers as well.
                raise Stopped(requests[0]) from None
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return results


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Inside this context SIGINT and SIGTERM are only noted in the list it yields; the second one is not so patient."""
    came: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if came:
            raise Stopped(number)
        came.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def start_worker() -> None:
    """Ctrl-C goes to all processes of a terminal, and the first one decides; if that one is killed, so are these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # Pillow's, of odd metadata and large pictures.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
