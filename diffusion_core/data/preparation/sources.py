"""Find the images to prepare: the files below a folder, or the images of a data set of torchvision."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from diffusion_core.data.folders import FolderError, arrange, list_images, notes
from diffusion_core.data.preparation.records import DATA_SETS, InputError, Job, Settings, Source

SUFFIXES = {"png": ".png", "jpeg": ".jpg"}


def find_images(settings: Settings, root: str | None = None) -> Source:
    """Find the images of a folder or of a data set.

    Args:
        settings: their source is a folder or the name of a data set.
        root: folder of torchvision's files, for a data set; None: torchvision's cache.

    Raises:
        InputError: if the images cannot be read or downloaded.
    """
    if settings.source in DATA_SETS:
        return Source(data_set_jobs(settings.source, root))
    return folder_source(Path(settings.source), SUFFIXES[settings.format])


def folder_source(root: Path, suffix: str) -> Source:
    """Return the images below a folder that training reads.

    Images in no class folder are passed over if there are class folders. A folder whose layout training refuses is
    prepared whole.

    Raises:
        InputError: if a folder cannot be read.
    """
    try:
        listing = list_images(root)
    except FolderError as error:
        raise InputError(f"SOURCE = {str(root)!r}: {error}") from None
    try:
        found = arrange(listing)
    except FolderError:
        found = None
    names = listing.images if found is None else found.images
    outputs = output_names(names, suffix)
    jobs = [Job(name, outputs[name], stamp(root / name)) for name in names]
    ignored = Counter(listing.passed_over)
    if loose := len(listing.images) - len(names):
        ignored["in no class folder"] = loose
    return Source(jobs, ignored, tuple(notes(listing, found)))


def stamp(path: Path) -> str:
    """Return the size and the time of a file; empty for a broken link, which the worker reports."""
    try:
        status = path.stat()
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
