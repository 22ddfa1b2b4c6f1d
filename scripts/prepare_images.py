"""Prepare a folder of images for training: decode, check, scale, and write every image in one size and format.

  python scripts/prepare_images.py photos data/photos --size 64
  python scripts/prepare_images.py photos data/photos --size 64 --min-size 48 --duplicates drop --dry-run
  python scripts/prepare_images.py cifar10 data/cifar10      extracts torchvision's files, downloads them if needed
  python scripts/train_cifar.py --data.name=folder --data.path=data/photos --data.image_size=64

SOURCE is a folder with one sub-folder per class, or with train/ and val/ or test/ that hold those; deeper folders keep
their place. Every image is rotated as its EXIF data say, put on white where it is transparent, and converted to 8-bit
RGB; of animations the first frame is used. Damaged and small images are dropped. As in training, all formats that
Pillow decodes are read, links to folders are followed, and hidden files, folders of systems (__MACOSX) and images
beside the class folders are passed over. TARGET/report.json lists dropped images with reasons. SOURCE is never changed.

SOURCE can also be cifar10, cifar100, mnist or fashion_mnist (write ./mnist for a folder of that name): TARGET gets
train/CLASS/NUMBER.png and test/CLASS/NUMBER.png with unchanged pixels; NUMBER is the index in the data set.

Stop it (Ctrl-C) and run it again: it continues, and the result equals that of an uninterrupted run. Run it again after
SOURCE changed: TARGET is updated. Exit status: 0; 1 if no image is usable; 2 if an argument is unusable.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from agent.command import fail, run_and_leave
from diffusion_core.data.preparation import (
    DATA_SETS,
    REPORT_FILE,
    SUFFIXES,
    InputError,
    Settings,
    check_target,
    describe,
    find_images,
    prepare,
)
from diffusion_core.messages import Parser
from diffusion_core.signals import signal_handler

SIZES = (4, 1024)
"""Range of ``data.image_size``, in pixels."""
FOLDER_OPTIONS = ("size", "min_size", "crop", "format", "duplicates")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="SOURCE", help=f"a folder of images, or one of {', '.join(DATA_SETS)}")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a new or empty folder, or that of the same call")
    parser.add_argument("--workers", metavar="N", help="number of processes (one per core)")
    parser.add_argument("--dry-run", action="store_true", help="read all images and report; do not change TARGET")
    folder = parser.add_argument_group("if SOURCE is a folder")
    folder.add_argument("--size", metavar="N", help="shorter side of the images, in pixels; required")
    folder.add_argument("--min-size", metavar="N", help="drop images whose shorter side has fewer pixels (--size)")
    folder.add_argument(
        "--crop", metavar="center|none", help="center: crop to a square (default); none: keep the shape"
    )
    folder.add_argument("--format", metavar="png|jpeg", help="png: lossless (default); jpeg: quality 95")
    folder.add_argument(
        "--duplicates",
        metavar="keep|drop",
        help="drop: of images with equal pixels, keep the one whose path sorts first (default: keep all)",
    )
    data_set = parser.add_argument_group("if SOURCE is a data set")
    data_set.add_argument("--root", metavar="DIR", help="folder of torchvision's files (~/.cache/torchvision)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""

    def interrupt(number: int) -> NoReturn:
        raise KeyboardInterrupt(number)

    try:
        with signal_handler((signal.SIGINT, signal.SIGTERM), interrupt):
            return prepare_images(parse_arguments(argv))
    except InputError as error:
        return fail(str(error))
    except KeyboardInterrupt as error:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 128 + int(error.args[0])


def prepare_images(arguments: argparse.Namespace) -> int:
    """Run the command, print its result, and return the exit status."""
    settings = check_arguments(arguments)
    target: Path = arguments.target
    workers = number("--workers", arguments.workers or str(os.cpu_count() or 1), 1, 1024)
    check_target(target, settings)
    source = find_images(settings, arguments.root)
    if not source.jobs:  # Do not empty TARGET: SOURCE may be a disk that is not mounted.
        for line in source.notes:
            print(f"note: {line}")
        print(f"nothing usable: no images below {arguments.source}", file=sys.stderr)
        return 1
    prepared = prepare(source, settings, target, workers, write=not arguments.dry_run)
    for line in describe(prepared, dry_run=arguments.dry_run):
        print(line)
    if not arguments.dry_run:
        print(f"full report: {target / REPORT_FILE}")
    if not prepared.report["kept"]:
        print(f"nothing usable: no image below {arguments.source} was kept", file=sys.stderr)
        return 1
    if problem := prepared.report["refused_by_training"]:
        print(f"not ready to train: {problem}")
    elif not arguments.dry_run:
        pixels = source.jobs[0].pixels
        size = settings.size if pixels is None else len(pixels)
        path = shlex.quote(str(target))
        print(f"to train: python scripts/train_cifar.py --data.name=folder --data.path={path} --data.image_size={size}")
    return 0


def check_arguments(arguments: argparse.Namespace) -> Settings:
    """Return the settings that the command line asks for.

    Raises:
        InputError: if an option, SOURCE or TARGET is unusable.
    """
    is_data_set = arguments.source in DATA_SETS
    for name in FOLDER_OPTIONS if is_data_set else ("root",):
        if (value := getattr(arguments, name)) is not None:
            only = "a folder" if is_data_set else ", ".join(DATA_SETS)
            raise InputError(
                f"--{name.replace('_', '-')} = {value!r}: has no effect with SOURCE = {arguments.source!r}, only with "
                f"{only}; leave it out"
            )
    if is_data_set:
        return Settings(arguments.source)
    source, target = Path(arguments.source).resolve(), arguments.target.resolve()
    if not source.is_dir():
        raise InputError(
            f"SOURCE = {arguments.source!r}: no such folder; expected a folder of images, or one of "
            f"{', '.join(DATA_SETS)}"
        )
    if source == target or source in target.parents or target in source.parents:
        raise InputError(
            f"TARGET = {str(arguments.target)!r}: one of SOURCE and TARGET contains the other; choose a TARGET outside "
            f"of {arguments.source!r}"
        )
    if arguments.size is None:
        raise InputError("--size: is missing; expected the shorter side in pixels, such as --size 64")
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
    """Return ``text`` if it is one of the choices; None means the first."""
    if text is not None and text not in choices:
        raise InputError(f"{key} = {text!r}: expected {' or '.join(choices)}")
    return text or choices[0]


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
