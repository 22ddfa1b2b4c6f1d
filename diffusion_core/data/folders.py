"""Find the images of a folder and their classes: one rule for preparation, training and evaluation.

:func:`list_images` walks a folder and counts what it passes over; :func:`arrange` finds splits and classes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffusion_core.data.classes import class_order, normal
from diffusion_core.data.image_files import IMAGE_SUFFIXES
from diffusion_core.messages import UserError, counted, listed, printable

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What folders that hold splits are called, in any case, and which split each is."""

SYSTEM_FOLDERS = frozenset(
    {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
)
"""Folders that systems and archives add, in lower case; images in them are copies, thumbnails or deleted."""

PREPARED = ".prepare.json"
PREPARATION_FILES = frozenset({PREPARED, ".prepare.jsonl", "report.json"})
"""Files that preparation writes beside the images."""

SAMPLE_NAME = re.compile(r"(\d+|none)-\d+\.png")
"""``{label}-{index}.png``: file names of scripts/sample_images.py."""

SAMPLE_OVERVIEWS = frozenset({"grid.png", "diffusion.gif"})
"""Files of scripts/sample_images.py that show many samples each."""


class FolderError(UserError):
    """A folder whose images cannot be used; the message is a reason and a remedy, without the name of the folder."""


@dataclass(frozen=True)
class Listing:
    """The content of a folder.

    Attributes:
        images: paths of the image files below the folder, with ``/``, sorted part by part.
        folders: paths of all folders below it that may hold images, likewise.
        passed_over: number of files and folders that are not read, by kind.
    """

    images: tuple[str, ...]
    folders: tuple[str, ...]
    passed_over: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_names(cls, names: Iterable[str]) -> Listing:
        """Return the listing of a folder that holds these images and nothing else."""
        images = sorted(names, key=_parts)
        folders = {str(folder) for name in images for folder in Path(name).parents[:-1]}
        return cls(tuple(images), tuple(sorted(folders, key=_parts)))


def list_images(root: Path) -> Listing:
    """List the images below a folder.

    Passed over are hidden files and folders, folders of systems, files without the suffix of an image, pipes and the
    like, and links to a folder that contains the link. Other links are followed. A link to a missing image is listed.

    Raises:
        FolderError: if a folder cannot be read.
    """
    images: list[str] = []
    folders: list[str] = []
    passed_over: Counter[str] = Counter()
    waiting: list[tuple[str, str, tuple[str, ...]]] = [("", os.path.realpath(root), ())]
    while waiting:
        place, real, hops = waiting.pop()
        entries = _entries(root / place)
        names = {entry.name for entry in entries}
        samples = bool(names & SAMPLE_OVERVIEWS) and any(map(SAMPLE_NAME.fullmatch, names))
        own = (PREPARATION_FILES if PREPARED in names else frozenset()) | (SAMPLE_OVERVIEWS if samples else frozenset())
        for entry in entries:
            path = f"{place}/{entry.name}" if place else entry.name
            if entry.name in own:
                continue
            if kind := _kind_to_pass(entry):
                passed_over[kind] += 1
            elif not entry.is_dir():
                images.append(path)
            elif not entry.is_symlink():
                folders.append(path)
                waiting.append((path, f"{real.rstrip('/')}/{entry.name}", hops))
            elif any(_contains(target := os.path.realpath(entry.path), hop) for hop in (*hops, real)):
                passed_over["link to a folder above it"] += 1
            else:
                folders.append(path)
                waiting.append((path, target, (*hops, real)))
    return Listing(tuple(sorted(images, key=_parts)), tuple(sorted(folders, key=_parts)), passed_over)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise FolderError(f"cannot read {str(folder)!r} ({error.strerror}); make it readable or move it away") from None


def _kind_to_pass(entry: os.DirEntry[str]) -> str:
    """Return what kind of entry this is if it is passed over, else an empty string."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return f"folder {entry.name}" if entry.name.casefold() in SYSTEM_FOLDERS else ""
    suffix = Path(entry.name).suffix.lower()
    if suffix in IMAGE_SUFFIXES and (entry.is_file() or entry.is_symlink()):
        return ""
    return suffix or "without a suffix"


def _contains(folder: str, path: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _parts(name: str) -> list[str]:
    return name.split("/")


@dataclass(frozen=True)
class Arrangement:
    """The images of a folder by split and class; images are paths below the folder.

    Attributes:
        class_names: in NFC, in the order of :func:`diffusion_core.data.classes.class_order`.
        train: images by class; those of all classes if the folder has no splits.
        val: images by class of the split that is held out; None if the folder has none.
        train_folder: folder of the training split, or an empty string.
        val_folder: folder of the split that is held out, or an empty string.
        unread: images of the splits that are neither, by folder.
        loose: images in no class folder.
    """

    class_names: tuple[str, ...]
    train: Mapping[str, list[str]]
    val: Mapping[str, list[str]] | None
    train_folder: str
    val_folder: str
    unread: Mapping[str, list[str]]
    loose: tuple[str, ...]

    @property
    def images(self) -> list[str]:
        """All images but loose ones, sorted: those of every split, read by training or not."""
        held_out = self.val or {}
        groups = [*self.train.values(), *held_out.values(), *self.unread.values()]
        return sorted((name for group in groups for name in group), key=_parts)


def arrange(listing: Listing) -> Arrangement:
    """Find the splits and classes of a folder.

    A sub-folder is a class, and deeper folders belong to it. Sub-folders called as in :data:`SPLITS` that hold class
    folders are splits; of ``val`` and ``test``, ``val`` is held out.

    Raises:
        FolderError: if there are no sub-folders, or what they are is ambiguous.
    """
    tops: dict[str, list[str]] = {folder: [] for folder in listing.folders if "/" not in folder}
    for name in listing.images:
        top, slash, rest = name.partition("/")
        if slash:
            tops[top].append(rest)
    if not tops:
        raise FolderError("no sub-folders; expected one sub-folder of images a class")
    splits = [top for top in tops if top.casefold() in SPLITS]
    nested = [top for top in splits if any("/" in rest for rest in tops[top])]
    others = [top for top, images in tops.items() if images and top not in splits]
    if nested and not others:
        return _with_splits(listing, splits, nested)
    if nested and not all(any("/" not in rest for rest in tops[top]) for top in splits):
        raise FolderError(
            f"{_folders(splits)} {_hold(splits)} class folders, as splits do, but {_folders(others)} {_be(others)} "
            "beside; move one kind away, or rename what is no split"
        )
    if splits and not others and any(tops.values()):
        raise FolderError(
            f"{_folders(splits)} {_hold(splits)} images but no class folders; put them into a folder a class, such as "
            f"{splits[0]}/all"
        )
    classes = _by_class(listing, "")
    return Arrangement(class_order(classes), classes, None, "", "", {}, _loose(listing, ""))


def _with_splits(listing: Listing, splits: list[str], nested: list[str]) -> Arrangement:
    found: dict[str, str] = {}
    for top in splits:
        kind = SPLITS[top.casefold()]
        if kind in found:
            raise FolderError(f"{_folders([found[kind], top])} are the same split; expected one of them")
        found[kind] = top
    if found.get("train") not in nested:
        raise FolderError(
            f"{_folders(nested)} {_hold(nested)} class folders, as splits do, but there is no such train/; add it, or "
            "rename what is no split"
        )
    train_folder = found["train"]
    val_folder = next((found[kind] for kind in ("val", "test") if found.get(kind) in nested), "")
    train, val = _by_class(listing, train_folder), _by_class(listing, val_folder) if val_folder else None
    if val is not None and set(train) != set(val):
        only = [f"{name!r} only in {train_folder}/" for name in sorted(set(train) - set(val))]
        only += [f"{name!r} only in {val_folder}/" for name in sorted(set(val) - set(train))]
        raise FolderError(f"{train_folder}/ and {val_folder}/ have different classes ({listed(only, 4)})")
    unread = {
        top: [name for name in listing.images if name.startswith(f"{top}/")]
        for top in splits
        if top not in (train_folder, val_folder)
    }
    loose = [*_loose(listing, ""), *_loose(listing, train_folder), *(_loose(listing, val_folder) if val else ())]
    return Arrangement(class_order(train), train, val, train_folder, val_folder, unread, tuple(loose))


def _by_class(listing: Listing, split: str) -> dict[str, list[str]]:
    """Return the images of a split, or of a folder without splits, by the NFC name of their class."""
    depth = 1 if split else 0
    inside = [path.split("/") for path in listing.folders if not split or path.startswith(f"{split}/")]
    folders = [parts[depth] for parts in inside if len(parts) == depth + 1]
    classes: dict[str, list[str]] = {}
    for name in folders:
        if normal(name) in classes:
            raise FolderError(f"two folders are called {normal(name)!r}, in different Unicode forms; rename one")
        classes[normal(name)] = []
    for path in listing.images:
        parts = path.split("/")
        if len(parts) > depth + 1 and (not split or parts[0] == split):
            classes[normal(parts[depth])].append(path)
    return classes


def _loose(listing: Listing, folder: str) -> tuple[str, ...]:
    depth = folder.count("/") + 1 if folder else 0
    start = f"{folder}/" if folder else ""
    return tuple(name for name in listing.images if name.startswith(start) and name.count("/") == depth)


def check_trainable(found: Arrangement) -> None:
    """Check that training accepts the classes of a folder.

    Raises:
        FolderError: if a class has no image, or none to hold out.
    """
    for folder, images in ((found.train_folder, found.train), (found.val_folder, found.val or {})):
        where = f" of {folder}/" if folder else ""
        if empty := [name for name in found.class_names if not images.get(name, [""])]:
            raise FolderError(
                f"class folder{'s' if len(empty) > 1 else ''} {listed(map(repr, empty), 5)}{where} "
                f"{_hold(empty)} no images; add some, or remove {'them' if len(empty) > 1 else 'it'}"
            )
    if found.val is None and (single := [name for name in found.class_names if len(found.train[name]) == 1]):
        raise FolderError(single_image(single))


def single_image(names: list[str]) -> str:
    """Return why classes of one image cannot be trained on."""
    what = f"classes {listed(map(repr, names), 5)} have 1 image each" if len(names) > 1 else f"class {names[0]!r} has 1"
    return f"{what}{'' if len(names) > 1 else ' image'}; expected at least 2, one of them held out; add images"


def notes(listing: Listing, found: Arrangement | None) -> Iterator[str]:
    """Yield a line for each kind of content that is not read; the same lines in all commands."""
    if found is not None:
        for folder, images in found.unread.items():
            yield f"{printable(folder)}/ ({counted(len(images), 'image')}) is neither trained on nor held out"
        if empty := [name for name in found.class_names if not found.train[name]]:
            yield f"no images in class folder {listed(map(repr, empty), 5)}"
        if found.loose:
            yield f"{counted(len(found.loose), 'image')} in no class folder: {listed(map(printable, found.loose), 3)}"
    if listing.passed_over:
        yield passed_over_line(listing.passed_over)


def nesting(found: Arrangement) -> Iterator[str]:
    """Yield a line if the only class looks like a folder of classes, such as one that an archive adds around them."""
    if len(found.class_names) != 1:
        return
    depth = 2 if found.train_folder else 1
    (images,) = found.train.values()
    inside = list(dict.fromkeys(name.split("/")[depth] for name in images if name.count("/") > depth))
    if len(inside) > 1 and not any(name.count("/") == depth for name in images):
        place = "/".join(images[0].split("/")[:depth])
        yield (
            f"warning: all images are of one class, {found.class_names[0]!r}; if {listed(map(repr, inside), 3)} are "
            f"the classes, name the folder {place!r} inside"
        )


def passed_over_line(passed_over: Mapping[str, int]) -> str:
    """Return how many files and folders are not read, by kind, most frequent first."""
    counts = sorted(passed_over.items(), key=lambda entry: (-entry[1], entry[0]))
    return f"passed over: {', '.join(f'{count:,} {printable(kind)}' for kind, count in counts)}"


def _folders(names: list[str]) -> str:
    return listed([f"{printable(name)}/" for name in names], 5)


def _hold(names: list[str]) -> str:
    return "holds" if len(names) == 1 else "hold"


def _be(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
