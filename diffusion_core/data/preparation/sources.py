"""Which images there are: the files below a folder, or those of a data set that torchvision knows."""

from __future__ import annotations

import itertools
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from diffusion_core.data.image_files import IMAGE_SUFFIXES
from diffusion_core.data.preparation.records import DATA_SETS, InputError, Job, Settings

SUFFIXES = {"png": ".png", "jpeg": ".jpg"}


def all_jobs(settings: Settings, root: str | None = None) -> tuple[list[Job], Counter[str]]:
    """A job for every image that settings name, sorted; and how many files were ignored, by kind.

    Args:
        settings: name a folder, or a data set.
        root: of a data set, where torchvision's files are; None: where torchvision keeps them here.

    Raises:
        InputError: if the images cannot be had.
    """
    if settings.source in DATA_SETS:
        return data_set_jobs(settings.source, root), Counter()
    return find_jobs(Path(settings.source), SUFFIXES[settings.format])


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
    """Size and modification time of a file, which show whether it changed; empty if it cannot be read."""
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
    from diffusion_core.data.datasets import DataError, load_data

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
