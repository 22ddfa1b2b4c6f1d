"""The target folder: check that it may be used, read and write its journal, remove outdated images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from diffusion_core.data.folders import PREPARED
from diffusion_core.data.preparation.records import UNREADABLE, InputError, Job, Result, Settings
from diffusion_core.files import write_json_lines

SETTINGS_FILE = PREPARED
JOURNAL_FILE = ".prepare.jsonl"
"""One line per image, appended as soon as it is done; a later call skips these images."""
REPORT_FILE = "report.json"


def check_target(target: Path, wanted: Settings) -> None:
    """Check that TARGET is new, empty, or holds results of the same settings.

    Raises:
        InputError: if it does not.
    """
    try:
        if not os.path.lexists(target) or all(path.match(".*.partial") for path in target.iterdir()):
            return
        there = json.loads((target / SETTINGS_FILE).read_text(encoding="utf-8"))
        other = [
            f"{'SOURCE' if key == 'source' else '--' + key.replace('_', '-')} was {there.get(key)!r}, is {value!r}"
            for key, value in asdict(wanted).items()
            if there.get(key) != value
        ]
        problem = other and f"holds results of other settings ({', '.join(other)})"
    except FileNotFoundError:
        problem = "not made by this script"
    except OSError as error:
        problem = str(error.strerror)
    except (ValueError, AttributeError):
        problem = f"its {SETTINGS_FILE} is damaged"
    if problem:
        raise InputError(f"TARGET = {str(target)!r}: {problem}; choose a new or an empty folder")


def read_journal(path: Path) -> list[Result]:
    """Read all results of earlier calls, including those that later lines replace; skip lines that a crash cut off."""
    results: list[Result] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError):
                results.append(Result(**json.loads(line)))
    return results


def write_journal(path: Path, results: Iterable[Result]) -> None:
    """Write one line per result."""
    write_json_lines(path, map(asdict, results))


def still_valid(jobs: Iterable[Job], old: Iterable[Result], target: Path) -> dict[str, Result]:
    """Return the earlier results whose source is unchanged and whose output exists, by source."""
    latest = {result.source: result for result in old}
    valid: dict[str, Result] = {}
    seen: set[str] = set()
    for job in jobs:
        result = latest.get(job.source)
        if result is None or (result.target, result.stamp) != (job.target, job.stamp):
            continue
        if result.dropped == UNREADABLE:  # A permission may have changed since, without a change of the file.
            continue
        was_duplicate = result.pixels in seen
        if result.pixels:
            seen.add(result.pixels)
        if result.dropped or was_duplicate or size_of(target / result.target) == result.bytes:
            valid[job.source] = result
    return valid


def size_of(path: Path) -> int | None:
    """Return the size of a file in bytes; None if it cannot be read."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def without_duplicates(results: Iterable[Result]) -> list[Result]:
    """Mark every result whose pixels equal those of an earlier one as dropped."""
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
    """Delete the images of ``made`` that ``final`` does not keep, and empty folders; returns the number of images."""
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
