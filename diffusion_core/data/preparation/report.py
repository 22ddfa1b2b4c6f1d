"""Report which images were kept and dropped, and why: as JSON, and in lines for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from diffusion_core.data.preparation.records import DATA_SETS, Prepared, Result, Settings

EXAMPLES = 3


def build_report(settings: Settings, results: Sequence[Result], ignored: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of the report file."""
    dropped = [result for result in results if result.dropped]
    found = count_by_class([result.source for result in results])
    kept = count_by_class([result.source for result in results if not result.dropped])
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


def count_by_class(paths: Sequence[str]) -> Counter[str]:
    """Count the images of each class folder that training would see; images in no class folder count under ''."""
    parts = [path.split("/")[:-1] for path in paths]
    top = sorted({part[0] for part in parts if part})
    depth = 2 if top in (["test", "train"], ["train", "val"]) else 1
    return Counter("/".join(part[:depth]) if len(part) >= depth else "" for part in parts)


def notes(
    settings: Settings, found: Mapping[str, int], kept: Mapping[str, int], ignored: Mapping[str, int]
) -> Iterator[str]:
    """Yield what the user should know before training."""
    if settings.source in DATA_SETS:
        return
    if loose := found.get(""):
        yield f"{loose} images lie in no class folder; training ignores them"
    if lost := sorted(set(found) - set(kept) - {""}):
        yield f"all images of {len(lost)} class folders were dropped: {', '.join(map(repr, lost[:EXAMPLES]))}"
    if links := ignored.get("link to a folder"):
        yield f"{links} links to folders were not followed; copy the folders themselves into SOURCE"


def describe(prepared: Prepared, *, dry_run: bool) -> Iterator[str]:
    """Yield the lines that the terminal shows of a call."""
    report, would = prepared.report, "would be " if dry_run else ""
    before = f" ({prepared.done_before} of them done by an earlier call)" if prepared.done_before else ""
    dropped = [result for result in prepared.results if result.dropped]
    yield f"{report['found']} images: {report['kept']} {would}kept, {len(dropped)} {would}dropped{before}"
    for reason, count in Counter(result.dropped for result in dropped).most_common():
        yield f"  {count} {reason}, such as"
        for result in [result for result in dropped if result.dropped == reason][:EXAMPLES]:
            yield f"    {printable(result.source)}: {printable(result.detail)}"
    if prepared.removed:
        yield f"removed {prepared.removed} images of an earlier call, because their sources changed or are gone"
    if report["ignored"]:
        yield ignored_line(report["ignored"])
    for note in report["notes"]:
        yield f"note: {note}"


def ignored_line(ignored: Mapping[str, int]) -> str:
    """Return how many files were ignored, by kind, most frequent first."""
    counts = Counter(ignored).most_common()
    return f"ignored: {', '.join(f'{count} {printable(kind)}' for kind, count in counts) or 'nothing'}"


def printable(text: str) -> str:
    """Escape the characters of a file name that a terminal cannot show on one line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
