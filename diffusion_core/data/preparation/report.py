"""Report which images were kept and dropped, and why: as JSON, and in lines for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from diffusion_core.data.folders import FolderError, Listing, arrange, check_trainable
from diffusion_core.data.preparation.records import Prepared, Result, Settings, Source
from diffusion_core.messages import counted, listed, printable

EXAMPLES = 3


def build_report(settings: Settings, results: Sequence[Result], source: Source) -> dict[str, Any]:
    """Return the content of the report file."""
    dropped = [result for result in results if result.dropped]
    kept = [result.target for result in results if not result.dropped]
    found = count_by_class([result.target for result in results])
    return {
        "settings": asdict(settings),
        "found": len(results),
        "kept": len(kept),
        "dropped": dict(sorted(Counter(result.dropped for result in dropped).items())),
        "ignored": dict(sorted(source.ignored.items())),
        "classes": count_by_class(kept),
        "notes": [*source.notes, *lost_classes(found, count_by_class(kept))],
        "refused_by_training": problem_of(kept) if kept else None,
        "images_dropped": [
            {"image": result.source, "reason": result.dropped, "detail": result.detail} for result in dropped
        ],
    }


def count_by_class(names: Sequence[str]) -> dict[str, int]:
    """Count the images of each class, by ``CLASS`` or ``SPLIT/CLASS``; by top folder if training refuses the layout."""
    try:
        found = arrange(Listing.of_names(names))
    except FolderError:
        return dict(sorted(Counter(name.partition("/")[0] if "/" in name else "" for name in names).items()))
    depth = 2 if found.train_folder else 1
    return dict(sorted(Counter("/".join(name.split("/")[:-1][:depth]) for name in found.images).items()))


def problem_of(names: Sequence[str]) -> str | None:
    """Return why training refuses a folder of these images; None if it does not."""
    try:
        check_trainable(arrange(Listing.of_names(names)))
    except FolderError as error:
        return str(error)
    return None


def lost_classes(found: Mapping[str, int], kept: Mapping[str, int]) -> Iterator[str]:
    """Yield a line if all images of some classes were dropped."""
    if lost := sorted(set(found) - set(kept) - {""}):
        yield f"all images of {counted(len(lost), 'class folder')} were dropped: {listed(map(repr, lost), EXAMPLES)}"


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
    for note in report["notes"]:
        yield f"note: {note}"
