"""Read a folder of class folders as a data set.

Axes: N images of a data set, C channels, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from diffusion_core.config import DataConfig
from diffusion_core.data.classes import normal
from diffusion_core.data.datasets import DataError, Dataset, DatasetRecord, Images, share_held_out, stratified_split
from diffusion_core.data.decoded import decoded_once
from diffusion_core.data.folders import FolderError, arrange, check_trainable, list_images, nesting, notes
from diffusion_core.data.image_files import ImageFileError, read_rgb, square
from diffusion_core.files import sha256
from diffusion_core.messages import printable, reason_of
from diffusion_core.registries import DATASETS
from diffusion_core.terminal.progress import Shown


def load_folder(config: DataConfig, progress: bool, order: Sequence[str] = ()) -> Dataset:
    """Read the folder that ``data.path`` names.

    Args:
        config: the folder, the size of the images, and the share to hold out if the folder has no such split.
        progress: show a bar.
        order: all names of the classes, in the order of their labels; by default the order of the folder.

    Raises:
        DataError: if there is no such folder, its classes are ambiguous, or an image cannot be read.
    """
    assert config.path is not None  # The schema refuses such a configuration.
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(f"data.path = {config.path!r}: no such folder")
    try:
        listing = list_images(root)
        found = arrange(listing)
        check_trainable(found)
    except FolderError as error:
        raise DataError(f"data.path = {config.path!r}: {error}") from None
    names = tuple(order) or found.class_names
    read = partial(_read_classes, root, names, config.image_shape[1], progress)
    if found.val is None:
        train, val = stratified_split(read(found.train), config.val_fraction, names)
    else:
        train, val = read(found.train), read(found.val)
    held_out = f"{printable(found.val_folder)}/" if found.val else share_held_out(config)
    told = (*notes(listing, found), *nesting(found), *_copies(train, val))
    return Dataset(train, val, names, held_out, told)


def _copies(train: Images, val: Images) -> Iterator[str]:
    """Yield a warning if images are in both splits."""
    known = {sha256(image) for image in train.images_NCHW}
    if copies := sum(sha256(image) in known for image in val.images_NCHW):
        yield (
            f"warning: {copies:,} of {len(val):,} held-out images are also training images, so figures on them mean "
            "little; remove the copies (scripts/prepare_images.py --duplicates drop)"
        )


def _read_classes(
    root: Path, class_names: Sequence[str], size: int, progress: bool, files: Mapping[str, Sequence[str]]
) -> Images:
    groups = [files[normal(name)] for name in class_names]
    names = [name for group in groups for name in group]
    labels = [label for label, group in enumerate(groups) for _ in group]

    def decode() -> np.ndarray:
        images_NCHW = np.empty((len(names), 3, size, size), dtype=np.uint8)

        def read(index: int) -> None:
            images_NCHW[index] = read_image(root / names[index], size).transpose(2, 0, 1)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done: Iterable[None] = pool.map(read, range(len(names)), chunksize=64)
            for _ in Shown(done, f"reading {root.name}", len(names), "image", shown=progress):
                pass
        return images_NCHW

    images_NCHW = decoded_once(root, names, size, decode)
    return Images(torch.from_numpy(images_NCHW), torch.tensor(labels))


def read_image(path: Path, size: int) -> np.ndarray:
    """Decode an image as RGB, scale its shorter side to ``size`` and crop the centre: ``(size, size, 3)`` uint8.

    Raises:
        DataError: if the file is no readable image.
    """
    try:
        return np.asarray(square(read_rgb(path), size))
    except (ImageFileError, OSError) as error:
        reason = reason_of(error)
        raise DataError(f"{str(path)!r}: not a readable image ({reason}); remove it") from None


DATASETS["folder"] = DatasetRecord(
    load_folder,
    "one sub-folder a class under data.path",
    channels=3,
    size=32,
    mirrored=True,
    path="required",
    load_ordered=load_folder,
)
