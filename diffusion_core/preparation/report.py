"""What was kept and dropped, and why: for the report file, and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from diffusion_core.preparation.records import DATA_SETS, Result, Settings

EXAMPLES = 3


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
