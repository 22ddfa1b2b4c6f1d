"""Make a folder of images ready for training: one size, one format, without the damaged and the too small ones.

  python scripts/prepare_images.py photos data/photos --size 64
  python scripts/prepare_images.py photos data/photos --size 64 --min-size 48 --duplicates drop --dry-run
  python scripts/prepare_images.py cifar10 data/cifar10      extracts torchvision's files, downloaded if need be
  python scripts/train_cifar.py --data.name=folder --data.path=data/photos --data.image_size=64

SOURCE is a folder with one sub-folder a class, or with train/ and test/ (or val/) that hold those; what lies deeper
keeps its place. Images are turned upright as their EXIF data say, put on white where they are transparent, become 8-bit
RGB, and of animations the first frame is taken. Files that are hidden or no images by their names are ignored, links to
folders not followed. What was dropped, and why, is in TARGET/report.json. SOURCE is only read.

Or SOURCE is cifar10, cifar100, mnist or fashion_mnist (./mnist is a folder): TARGET gets train/CLASS/NUMBER.png and
test/CLASS/NUMBER.png, the pixels as they are, the number being the image's place in the data set.

Stop it (Ctrl-C) and run it again: it goes on, and the result is that of an unbroken run. Run it again after SOURCE has
changed, and TARGET follows. Exit status: 0, 1 if there is no usable image, 2 if something asked for cannot be had.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffusion_core.image_files import IMAGE_SUFFIXES, ImageFileError, ImageTooLarge, read_rgb, square

DATA_SETS = ("cifar10", "cifar100", "mnist", "fashion_mnist")
SETTINGS_FILE = ".prepare.json"
JOURNAL_FILE = ".prepare.jsonl"
"""One line an image, written as it is done: what a later call need not do again."""
REPORT_FILE = "report.json"

SIZES = (4, 1024)
"""What training takes as ``data.image_size``."""
SUFFIXES = {"png": ".png", "jpeg": ".jpg"}
JPEG_OPTIONS = {"quality": 95, "subsampling": 0}
UNREADABLE = "unreadable"
LONGEST_SIDE = 65_500
"""Pixels; JPEG can hold no more. Uncropped, a picture of few rows could grow to any length."""

CHUNK = 8
"""Images a worker takes at a time: few, since stopping waits for them."""
EXAMPLES = 3


class InputError(ValueError):
    """Something asked for that cannot be had; the message is one line meant for the user."""


class Stopped(Exception):
    """A signal asked to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Settings:
    """What decides how TARGET looks; the options that have no meaning for a data set are None there."""

    source: str
    size: int | None = None
    min_size: int | None = None
    crop: str | None = None
    format: str = "png"
    duplicates: str | None = None


class Job(NamedTuple):
    """An image to make."""

    source: str
    """Path below SOURCE, or split and number in a data set."""
    target: str
    """Path below TARGET."""
    stamp: str
    """Changes when the source does."""
    pixels: np.ndarray | None = None
    """The image itself where it comes from a data set: ``(H, W)`` or ``(H, W, 3)``, uint8."""


@dataclass(frozen=True)
class Result:
    """What became of a job."""

    source: str
    target: str
    stamp: str
    bytes: int = 0
    pixels: str = ""
    """Hash of the decoded pixels, where duplicates are looked for."""
    dropped: str = ""
    """Kind of reason; empty: the image was made."""
    detail: str = ""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE", help=f"a folder of images, or one of {', '.join(DATA_SETS)}")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to make; new, empty, or of the same call")
    parser.add_argument("--workers", metavar="N", help="processes (one a core)")
    parser.add_argument(
        "--dry-run", action="store_true", help="read all images and say what would be done; TARGET stays as it is"
    )
    folder = parser.add_argument_group("where SOURCE is a folder")
    folder.add_argument("--size", metavar="N", help="pixels of an image's shorter side; needed")
    folder.add_argument("--min-size", metavar="N", help="drop images whose shorter side has fewer pixels (--size)")
    folder.add_argument("--crop", metavar="center|none", help="center: to a square (default); none: keep the shape")
    folder.add_argument("--format", metavar="png|jpeg", help="png: without loss (default); jpeg: at quality 95")
    folder.add_argument("--duplicates", metavar="keep|drop", help="drop: of images with equal pixels, anywhere in the "
                        "tree, keep the one whose path comes first (default: keep all)")  # fmt: skip
    data_set = parser.add_argument_group("where SOURCE is a data set")
    data_set.add_argument("--root", metavar="DIR", help="where torchvision's files are (~/.cache/torchvision)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        arguments = parse_arguments(argv)
        return prepare_images(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as stop:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def prepare_images(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for."""
    settings = check_arguments(arguments)
    target: Path = arguments.target
    workers = number("--workers", arguments.workers, 1, 1024) if arguments.workers else os.cpu_count() or 1
    check_target(target, settings)
    if settings.source in DATA_SETS:
        jobs, ignored = data_set_jobs(settings.source, arguments.root), Counter[str]()
    else:
        jobs, ignored = find_jobs(Path(settings.source), SUFFIXES[settings.format])
    if not jobs:  # Also where there once were some: a disk that is not mounted shall not empty TARGET.
        print_ignored(ignored)
        print(f"nothing usable: no images below {arguments.source}", file=sys.stderr)
        return 1
    old = read_journal(target / JOURNAL_FILE)
    done = still_valid(jobs, old, target)
    gone = 0
    try:
        if not arguments.dry_run:
            target.mkdir(parents=True, exist_ok=True)
            write_json(target / SETTINGS_FILE, asdict(settings))
        made = run(jobs, done, settings, target, workers, write=not arguments.dry_run)
        results = without_duplicates(made)
        report = summary(settings, results, ignored)
        if not arguments.dry_run:
            remove(target, made, results)
            gone = remove(target, old, results)
            write_journal(target / JOURNAL_FILE, made)
            write_json(target / REPORT_FILE, report)
    except OSError as error:
        reason = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        raise InputError(f"TARGET = {str(target)!r}: {reason}; put that right, and the same command goes on") from None
    except (BrokenProcessPool, MemoryError):
        raise InputError(f"--workers = {workers}: a worker was killed, perhaps for want of memory; try fewer, the same "
                         "command goes on from here") from None  # fmt: skip
    kept = [result for result in results if not result.dropped]
    would = "would be " if arguments.dry_run else ""
    print(f"{len(results)} images: {len(kept)} {would}kept, {len(results) - len(kept)} {would}dropped"
          + (f" ({len(done)} of them done by an earlier call)" if done else ""))  # fmt: skip
    print_dropped(results)
    if gone:
        print(f"removed {gone} images of an earlier call, since their sources have changed or gone")
    print_ignored(ignored)
    for note in report["notes"]:
        print(f"note: {note}")
    if not arguments.dry_run:
        print(f"all of it is in {target / REPORT_FILE}")
    if not kept:
        print(f"nothing usable: no image below {arguments.source} was kept", file=sys.stderr)
        return 1
    if not arguments.dry_run:
        size = settings.size if jobs[0].pixels is None else len(jobs[0].pixels)
        print("to train: python scripts/train_cifar.py --data.name=folder "
              f"--data.path={shlex.quote(str(target))} --data.image_size={size}")  # fmt: skip
    return 0


# What is asked for.


def check_arguments(arguments: argparse.Namespace) -> Settings:
    """The settings that the command line asks for.

    Raises:
        InputError: if there is something wrong with an option, SOURCE or TARGET.
    """
    folder_options = ("size", "min_size", "crop", "format", "duplicates")
    is_data_set = arguments.source in DATA_SETS
    for name in folder_options if is_data_set else ("root",):
        if (value := getattr(arguments, name)) is not None:
            remedy = "extract it, then prepare TARGET" if is_data_set else f"of use with {', '.join(DATA_SETS)} only"
            raise InputError(f"--{name.replace('_', '-')} = {value!r}: of no use with SOURCE = {arguments.source!r}; "
                             f"leave it out ({remedy})")  # fmt: skip
    if is_data_set:
        return Settings(arguments.source)
    source, target = Path(arguments.source).resolve(), arguments.target.resolve()
    if not source.is_dir():
        raise InputError(f"SOURCE = {arguments.source!r}: no such folder; expected a folder of images, or one of "
                         f"{', '.join(DATA_SETS)}")  # fmt: skip
    if source == target or source in target.parents or target in source.parents:
        raise InputError(f"TARGET = {str(arguments.target)!r}: SOURCE and TARGET lie in each other; choose a TARGET "
                         f"outside of {arguments.source!r}")  # fmt: skip
    if arguments.size is None:
        raise InputError("--size is missing; expected the pixels of a side, such as --size 64")
    size = number("--size", arguments.size, *SIZES)
    return Settings(
        source=str(source),
        size=size,
        min_size=size if arguments.min_size is None else number("--min-size", arguments.min_size, 1, 1_000_000),
        crop=choice("--crop", arguments.crop, ("center", "none")),
        format=choice("--format", arguments.format, tuple(SUFFIXES)),
        duplicates=choice("--duplicates", arguments.duplicates, ("keep", "drop")),
    )


def number(key: str, text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise InputError(f"{key} = {text!r}: expected an integer from {least} to {most}")
    return int(text)


def choice(key: str, text: str | None, choices: tuple[str, ...]) -> str:
    """The first choice is the default."""
    if text is not None and text not in choices:
        raise InputError(f"{key} = {text!r}: expected {' or '.join(choices)}")
    return text or choices[0]


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


# Which images there are.


def find_jobs(root: Path, suffix: str) -> tuple[list[Job], Counter[str]]:
    """A job for every image file below a folder, sorted; and how many files were ignored, by kind."""
    stamps: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise InputError(f"SOURCE = {str(root)!r}: cannot read {str(folder)!r} ({error.strerror}); make it "
                             "readable or move it away") from None  # fmt: skip
        for entry in entries:
            kind = Path(entry.name).suffix.lower()
            if entry.name.startswith("."):
                ignored["hidden"] += 1
            elif entry.is_dir():
                if entry.is_symlink():  # It might lead anywhere: in a circle, or to all the disk.
                    ignored["link to a folder"] += 1
                else:
                    folders.append(Path(entry.path))
            elif kind in IMAGE_SUFFIXES and (entry.is_file() or entry.is_symlink()):
                stamps[Path(entry.path).relative_to(root).as_posix()] = stamp(entry)
            else:
                ignored[kind or "without a suffix"] += 1
    names = sorted(stamps, key=lambda name: name.split("/"))
    return [Job(name, output, stamps[name]) for name, output in output_names(names, suffix).items()], ignored


def stamp(entry: os.DirEntry[str]) -> str:
    try:
        status = entry.stat()
    except OSError:  # A link that leads nowhere, which the worker will report.
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def output_names(names: Sequence[str], suffix: str) -> dict[str, str]:
    """The path of every image's output: another suffix, and where that is taken twice, a longer name for both.

    Compared without case, as some file systems do.
    """
    plain = {name: str(Path(name).with_suffix(suffix)) for name in names}
    folders = {str(folder).casefold() for name in names for folder in Path(name).parents}
    uses = Counter(itertools.chain((output.casefold() for output in plain.values()), folders))
    taken = set(uses)
    for name, output in plain.items():
        if uses[output.casefold()] > 1:
            longer = itertools.chain([f"{name}{suffix}"], (f"{name}-{i}{suffix}" for i in itertools.count(2)))
            plain[name] = next(path for path in longer if path.casefold() not in taken)
            taken.add(plain[name].casefold())
    return plain


def data_set_jobs(name: str, root: str | None) -> list[Job]:
    """A job for every image of a data set that torchvision knows; downloads what is not there.

    Raises:
        InputError: if it can be neither read nor downloaded.
    """
    from diffusion_core.config import DataConfig  # These two bring along PyTorch, and folders do without it.
    from diffusion_core.data import DataError, load_data

    if root == "":
        raise InputError("--root = '': expected a folder")
    try:
        data = load_data(DataConfig.model_validate({"name": name, "path": root}))
    except DataError as error:
        raise InputError(f"SOURCE = {name!r}, --root = {root!r}: {error}") from None
    folders = [name.replace("/", "-") for name in data.class_names]  # One is called T-shirt/top.
    jobs = []
    for split, images in (("train", data.train), ("test", data.val)):
        arrays_NHWC = images.images_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
        for i, (array, label) in enumerate(zip(arrays_NHWC, images.labels_N.tolist(), strict=True)):
            pixels = array[..., 0] if array.shape[2] == 1 else array
            output = f"{split}/{folders[label]}/{i:05d}.png"
            jobs.append(Job(f"{split}/{i}", output, f"{zlib.crc32(array):08x}", pixels))
    return jobs


# Doing it.


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


def make_image(job: Job, *, settings: Settings, target: Path, write: bool) -> Result:
    """Read, check, scale and write an image; depends on the job and the settings alone."""
    result = Result(job.source, job.target, job.stamp)
    if job.pixels is not None:
        image = Image.fromarray(job.pixels)
    else:
        assert settings.size is not None
        assert settings.min_size is not None
        try:
            image = read_rgb(Path(settings.source) / job.source)
        except ImageTooLarge as error:
            return replace(result, dropped="too large", detail=str(error))
        except ImageFileError as error:
            return replace(result, dropped="corrupt", detail=str(error))
        except OSError as error:
            return replace(result, dropped=UNREADABLE, detail=str(error.strerror))
        shape = f"{image.width}x{image.height}"
        if min(image.size) < settings.min_size:
            return replace(result, dropped="too small", detail=f"{shape}, expected {settings.min_size} or more")
        if settings.duplicates == "drop":
            digest = hashlib.blake2b(shape.encode() + image.tobytes(), digest_size=16)
            result = replace(result, pixels=digest.hexdigest())
        if settings.crop == "center":
            image = square(image, settings.size)
        else:
            scaled = [round(side * settings.size / min(image.size)) for side in image.size]
            if max(scaled) > LONGEST_SIDE:
                return replace(result, dropped="too long", detail=f"{shape} would become {scaled[0]}x{scaled[1]}")
            image = image.resize((scaled[0], scaled[1]), Image.Resampling.LANCZOS)
    return replace(result, bytes=save(image, target / job.target, settings.format)) if write else result


def save(image: Image.Image, path: Path, kind: str) -> int:
    """Write an image in one piece, so that what is there is whole; returns its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    image.save(temporary, format=kind, **(JPEG_OPTIONS if kind == "jpeg" else {}))
    size = temporary.stat().st_size
    temporary.replace(path)
    return size


# What is done already, and what it comes to.


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


def print_dropped(results: Sequence[Result]) -> None:
    for reason, count in Counter(result.dropped for result in results if result.dropped).most_common():
        print(f"  {count} {reason}, such as")
        for result in [result for result in results if result.dropped == reason][:EXAMPLES]:
            print(f"    {printable(result.source)}: {printable(result.detail)}")


def print_ignored(ignored: Counter[str]) -> None:
    if ignored:
        print(f"ignored: {', '.join(f'{count} {printable(kind)}' for kind, count in ignored.most_common())}")


def printable(text: str) -> str:
    """A file name that any terminal takes, on one line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece: under another name, flushed, then renamed."""
    temporary = temporary_name(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
