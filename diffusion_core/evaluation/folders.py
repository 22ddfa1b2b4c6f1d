"""Read folders of images and files of statistics for evaluation."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_core.config.metrics import space_name
from diffusion_core.data.datasets import DataError
from diffusion_core.data.image_files import IMAGE_SUFFIXES, ImageFileError, read_rgb
from diffusion_core.distributed import own_positions
from diffusion_core.evaluation.features import Extractor
from diffusion_core.evaluation.measure import FEWEST, Reference, Seen, look
from diffusion_core.evaluation.reference import read_statistics
from diffusion_core.messages import reason_of

SAMPLE_NAME = re.compile(r"(\d+)-\d+\.png")
"""``{label}-{index}.png``: file names of scripts/sample_images.py."""

NOT_IMAGES = frozenset({"grid.png", "diffusion.gif"})
"""Other files of scripts/sample_images.py."""

STATISTICS_SUFFIX = ".npz"
STATISTICS_SPACE = "statistics"
"""Name of the feature space of two files of statistics, which do not record it."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, or of its sub-folders.

    Attributes:
        path: the folder.
        files: the image files, sorted.
        labels: classes of the images if all file names contain them, else None.
    """

    path: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, positions: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield images by position, uint8 ``(B, 3, H, W)``, and labels; positions past the end yield the last image.

        Raises:
            DataError: if an image cannot be read, or its size differs from the first image's.
        """
        last = len(self.files) - 1
        first_HW = self._read(0).shape[:2]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(positions), batch_size):
                chosen = [min(position, last) for position in positions[start : start + batch_size]]
                arrays = list(pool.map(self._read, chosen))
                for position, array in zip(chosen, arrays, strict=True):
                    if array.shape[:2] != first_HW:
                        raise DataError(
                            f"{str(self.files[position])!r}: {array.shape[1]} x {array.shape[0]} pixels, and the "
                            f"first image of the folder {first_HW[1]} x {first_HW[0]}; expected images of one size "
                            f"(scripts/prepare_images.py resizes them)"
                        )
                images_BCHW = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
                yield images_BCHW, None if self.labels is None else torch.tensor([self.labels[i] for i in chosen])

    def _read(self, position: int) -> np.ndarray:
        try:
            return np.asarray(read_rgb(self.files[position]))
        except (ImageFileError, OSError) as error:
            reason = reason_of(error)
            raise DataError(f"{str(self.files[position])!r}: not a readable image ({reason}); remove it") from None


def image_folder(path: Path) -> ImageFolder:
    """Return the images in a folder; if it contains none, those in its sub-folders.

    Raises:
        DataError: if there is no such folder, or no image in it.
    """
    if not path.is_dir():
        raise DataError(f"{str(path)!r}: no such folder")
    files = _images(path.iterdir()) or _images(path.rglob("*"))
    if not files:
        raise DataError(f"{str(path)!r}: no images in it; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    matches = [SAMPLE_NAME.fullmatch(file.name) for file in files]
    labels = tuple(int(match[1]) for match in matches if match)
    return ImageFolder(path, tuple(files), labels if len(labels) == len(files) else None)


def _images(paths: Iterator[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.name not in NOT_IMAGES)


def is_statistics(path: Path) -> bool:
    """Return whether a path names a file of statistics, not a folder of images."""
    return path.suffix == STATISTICS_SUFFIX


def see(path: Path, extractor: Extractor | None, batch_size: int, *, keep: bool) -> Seen:
    """Compute the statistics of a folder of images in a feature space, or read a file of statistics.

    Raises:
        DataError: if it is missing, empty, damaged, or holds a single image.
    """
    if is_statistics(path):
        return Seen(extractor.name if extractor else STATISTICS_SPACE, read_statistics(path))
    assert extractor is not None
    folder = image_folder(path)
    if len(folder) < FEWEST:
        raise DataError(f"{str(path)!r}: holds a single image; expected at least {FEWEST} to compare")
    batches = folder.batches(own_positions(len(folder)), batch_size)
    (seen,) = look([extractor], batches, len(folder), keep=keep)
    return seen


def as_reference(path: Path, seen: Seen) -> Reference:
    """Return images as the reference of a comparison, named for their path."""
    count = "statistics" if seen.statistics.count is None else f"{seen.statistics.count:,} images"
    return Reference(space_name(path.stem), f"{path} ({count})", seen.statistics, seen.features_ND, seen.labels_N)
