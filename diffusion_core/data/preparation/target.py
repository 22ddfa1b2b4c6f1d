"""The folder that is made: whose it is, the journal of what is done, what of it is still valid, what has to go."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusion_core.data.preparation.records import UNREADABLE, InputError, Job, Result, Settings

SETTINGS_FILE = ".prepare.json"
JOURNAL_FILE = ".prepare.jsonl"
"""One line an image, written as it is done: what a later call need not do again."""
REPORT_FILE = "report.json"


def check_target(target: Path, wanted: Settings) -> None:
    """Make sure that TARGET is new, empty, or holds results of these very settings.

    Raises:
        InputError: if it does not.
    """
    unfinished = temporary_name(target / SETTINGS_FILE)
    try:
        if not os.path.lexists(target) or (target.is_dir() and all(path == unfinished for path in target.iterdir())):
            return
        if not (target / SETTINGS_FILE).is_file():
            raise InputError(f"TARGET = {str(target)!r}: not made by this script; choose a new or an empty folder")
        there = json.loads((target / SETTINGS_FILE).read_text(encoding="utf-8"))
        other = [
            f"{'SOURCE' if key == 'source' else '--' + key.replace('_', '-')} was {there.get(key)!r}, is {value!r}"
            for key, value in asdict(wanted).items()
            if there.get(key) != value
        ]
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else f"its {SETTINGS_FILE} is damaged"
        raise InputError(f"TARGET = {str(target)!r}: {reason}; choose another folder") from None
    if other:
        raise InputError(f"TARGET = {str(target)!r}: holds results of other settings ({', '.join(other)}); choose "
                         "another folder, or remove it")  # fmt: skip


def temporary_name(path: Path) -> Path:
    """Hidden, no image by its name, always the same for a file, and short, since the file's own may be very long."""
    return path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.partial")


def read_journal(path: Path) -> list[Result]:
    """All results of earlier calls, also those that later ones replace; a line that a crash cut is passed over."""
    results: list[Result] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError):
                results.append(Result(**json.loads(line)))
    return results


def write_journal(path: Path, results: Iterable[Result]) -> None:
    """Write one line of JSON per result."""
    write_text(path, "".join(json.dumps(asdict(result)) + "\n" for result in results))


def still_valid(jobs: Iterable[Job], old: Iterable[Result], target: Path) -> dict[str, Result]:
    """Those results of earlier calls whose source is as it was, and whose output is there."""
    latest = {result.source: result for result in old}
    valid: dict[str, Result] = {}
    seen: set[str] = set()
    for job in jobs:
        result = latest.get(job.source)
        if result is None or (result.target, result.stamp) != (job.target, job.stamp):
            continue
        if result.dropped == UNREADABLE:  # Which may be put right without a change of the file.
            continue
        was_duplicate = result.pixels in seen
        if result.pixels:
            seen.add(result.pixels)
        if result.dropped or was_duplicate or size_of(target / result.target) == result.bytes:
            valid[job.source] = result
    return valid


def size_of(path: Path) -> int | None:
    """Size of a file in bytes, or None if it cannot be read."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def without_duplicates(results: Iterable[Result]) -> list[Result]:
    """The results, with all images dropped whose pixels an earlier one has."""
    first: dict[str, str] = {}
    final = []
    for result in results:
        if result.pixels and not result.dropped:
            source = first.setdefault(result.pixels, result.source)
            if source != result.source:
                result = replace(result, dropped="duplicate", detail=f"of {source}")
        final.append(result)
    return final


def remove(target: Path, made: Iterable[Result], final: Iterable[Result]) -> int:
    """Remove images that were made and are not wanted: duplicates, and those of sources that have changed or gone."""
    wanted = {result.target for result in final if not result.dropped}
    removed = 0
    for path in sorted({result.target for result in made if not result.dropped} - wanted):
        with suppress(FileNotFoundError):
            (target / path).unlink()
            removed += 1
        for folder in Path(path).parents[:-1]:
            if not (target / folder).is_dir() or any((target / folder).iterdir()):
                break
            (target / folder).rmdir()
    return removed


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece: under another name, flushed, then renamed."""
    temporary = temporary_name(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
