"""Find the images to prepare: the files below a folder, or the images of a data set of torchvision."""

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


def find_images(settings: Settings, root: str | None = None) -> tuple[list[Job], Counter[str]]:
    """Return a job for every image, sorted, and the number of ignored files by kind.

    Args:
        settings: their source is a folder or the name of a data set.
        root: folder of torchvision's files, for a data set; None: torchvision's cache.

    Raises:
        InputError: if the images cannot be read or downloaded.
    """
    if settings.source in DATA_SETS:
        return data_set_jobs(settings.source, root), Counter()
    return folder_jobs(Path(settings.source), SUFFIXES[settings.format])


def folder_jobs(root: Path, suffix: str) -> tuple[list[Job], Counter[str]]:
    """Return a job for every image file below a folder, sorted, and the number of ignored files by kind."""
    stamps: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise InputError(
                f"SOURCE = {str(root)!r}: cannot read {str(folder)!r} ({error.strerror}); make it readable or move it "
                "away"
            ) from None
        for entry in entries:
            kind = Path(entry.name).suffix.lower()
            if entry.name.startswith("."):
                ignored["hidden"] += 1
            elif entry.is_dir():
                if entry.is_symlink():  # The link may form a cycle or leave SOURCE.
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
    """Return the size and the time of a file; empty for a broken link, which the worker reports."""
    try:
        status = entry.stat()
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def output_names(names: Sequence[str], suffix: str) -> dict[str, str]:
    """Return the output path of every image: its path with another suffix, or a longer name if that is not unique.

    Names that differ only in case count as equal, as on some file systems.
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
    """Return a job for every image of a data set of torchvision; downloads missing files.

    Raises:
        InputError: if the data set can be neither read nor downloaded.
    """
    from diffusion_core.config import DataConfig  # Import PyTorch, which folders do not need.
    from diffusion_core.data.datasets import DataError, load_data

    if root == "":
        raise InputError("--root = '': expected a folder")
    try:
        data = load_data(DataConfig.model_validate({"name": name, "path": root}))
    except DataError as error:
        raise InputError(f"SOURCE = {name!r}, --root = {root!r}: {error}") from None
    folders = [name.replace("/", "-") for name in data.class_names]  # A class is called T-shirt/top.
    jobs = []
    for split, images in (("train", data.train), ("test", data.val)):
        arrays_NHWC = images.images_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
        for i, (array, label) in enumerate(zip(arrays_NHWC, images.labels_N.tolist(), strict=True)):
            pixels = array[..., 0] if array.shape[2] == 1 else array
            output = f"{split}/{folders[label]}/{i:05d}.png"
            jobs.append(Job(f"{split}/{i}", output, f"{zlib.crc32(array):08x}", pixels))
    return jobs
