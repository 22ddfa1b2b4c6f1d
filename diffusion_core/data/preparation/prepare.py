"""Prepare a whole tree of images, keep what earlier calls did, and report what was kept and dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_core.data.preparation.records import DATA_SETS, InputError, Job, Result, Settings
from diffusion_core.data.preparation.target import (
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
from diffusion_core.data.preparation.workers import run

EXAMPLES = 3


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
        """Number of images that were written."""
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


def summary(settings: Settings, results: Sequence[Result], ignored: Mapping[str, int]) -> dict[str, Any]:
    """What stands in the report."""
    dropped = [result for result in results if result.dropped]
    found = folders_of([result.source for result in results])
    kept = folders_of([result.source for result in results if not result.dropped])
    return {
        "settings": asdict(settings),
        "found": len(results),
        "kept": len(results) - len(dropped),
        "dropped": dict(sorted(Counter(result.dropped for result in dropped).items())),
        "ignored": dict(sorted(ignored.items())),
        "classes": dict(sorted(kept.items())),
        "notes": list(notes(settings, found, kept, ignored)),
        "images_dropped": [
            {"image": result.source, "reason": result.dropped, "detail": result.detail} for result in dropped
        ],
    }


def folders_of(paths: Sequence[str]) -> Counter[str]:
    """Number of images in each class folder, as training sees it; those that lie in none are counted under ''."""
    parts = [path.split("/")[:-1] for path in paths]
    top = sorted({part[0] for part in parts if part})
    depth = 2 if top in (["test", "train"], ["train", "val"]) else 1
    return Counter("/".join(part[:depth]) if len(part) >= depth else "" for part in parts)


def notes(
    settings: Settings, found: Mapping[str, int], kept: Mapping[str, int], ignored: Mapping[str, int]
) -> Iterator[str]:
    """What the user should know before training."""
    if settings.source in DATA_SETS:
        return
    if loose := found.get(""):
        yield f"{loose} images lie in no class folder; training does not see them"
    if lost := sorted(set(found) - set(kept) - {""}):
        yield f"no image is left of {len(lost)} class folders: {', '.join(map(repr, lost[:EXAMPLES]))}"
    if links := ignored.get("link to a folder"):
        yield f"{links} links to folders were not followed; put the folders themselves there"


def dropped_lines(results: Sequence[Result]) -> Iterator[str]:
    """How many images were dropped for which reason, with examples."""
    for reason, count in Counter(result.dropped for result in results if result.dropped).most_common():
        yield f"  {count} {reason}, such as"
        for result in [result for result in results if result.dropped == reason][:EXAMPLES]:
            yield f"    {printable(result.source)}: {printable(result.detail)}"


def ignored_lines(ignored: Counter[str]) -> Iterator[str]:
    """How many files were passed over, by kind; nothing if there were none."""
    if ignored:
        yield f"ignored: {', '.join(f'{count} {printable(kind)}' for kind, count in ignored.most_common())}"


def printable(text: str) -> str:
    """A file name that any terminal takes, on one line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
