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
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from diffusion_core.data.preparation.prepare import dropped_lines, ignored_lines, prepare
from diffusion_core.data.preparation.records import DATA_SETS, InputError, Settings
from diffusion_core.data.preparation.sources import SUFFIXES, all_jobs
from diffusion_core.data.preparation.target import REPORT_FILE, check_target
from diffusion_core.data.preparation.workers import Stopped

SIZES = (4, 1024)
"""What training takes as ``data.image_size``."""


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
    """Do what the command line asks for, and say what came of it."""
    settings = check_arguments(arguments)
    target: Path = arguments.target
    workers = number("--workers", arguments.workers, 1, 1024) if arguments.workers else os.cpu_count() or 1
    check_target(target, settings)
    jobs, ignored = all_jobs(settings, arguments.root)
    if not jobs:  # Also where there once were some: a disk that is not mounted shall not empty TARGET.
        for line in ignored_lines(ignored):
            print(line)
        print(f"nothing usable: no images below {arguments.source}", file=sys.stderr)
        return 1
    prepared = prepare(jobs, ignored, settings, target, workers, write=not arguments.dry_run)
    kept, total = prepared.kept, len(jobs)
    would = "would be " if arguments.dry_run else ""
    print(f"{total} images: {kept} {would}kept, {total - kept} {would}dropped"
          + (f" ({prepared.done_before} of them done by an earlier call)" if prepared.done_before else ""))  # fmt: skip
    for line in dropped_lines(prepared.results):
        print(line)
    if prepared.removed:
        print(f"removed {prepared.removed} images of an earlier call, since their sources have changed or gone")
    for line in ignored_lines(ignored):
        print(line)
    for note in prepared.report["notes"]:
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


if __name__ == "__main__":
    sys.exit(main())
