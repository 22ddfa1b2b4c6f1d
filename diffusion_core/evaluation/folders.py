"""Read folders of images and files of statistics for evaluation, and small images to upsample."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_core.checkpoint import Checkpoint
from diffusion_core.config import ConfigError, CoreConfig
from diffusion_core.config.metrics import space_name
from diffusion_core.data.classes import shown_classes
from diffusion_core.data.datasets import DataError, load_data
from diffusion_core.data.folders import (
    SAMPLE_NAME,
    Arrangement,
    FolderError,
    Listing,
    arrange,
    list_images,
    notes,
    passed_over_line,
)
from diffusion_core.data.image_files import ImageFileError, read_rgb
from diffusion_core.distributed import own_positions
from diffusion_core.evaluation.features import Extractor, with_channels
from diffusion_core.evaluation.measure import (
    CLASSES,
    DATA_SET,
    EVERY_IMAGE,
    FEWEST,
    LABELS,
    Reference,
    Seen,
    check_figures,
    look,
    needs_every_image,
)
from diffusion_core.evaluation.reference import read_statistics, write_statistics
from diffusion_core.evaluation.suite import Judgement
from diffusion_core.files import new_file, sha256
from diffusion_core.messages import counted, reason_of
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.redact import redact
from diffusion_core.sampling.generation import Request
from diffusion_core.sampling.image_folder import request_of
from diffusion_core.sampling.lows import HeldOut, held_out
from diffusion_core.terminal.progress import say

SAMPLE_LABEL = re.compile(r"(\d+)-\d+\.png")
"""The label in a file name of scripts/sample_images.py."""

BATCH = 64
"""Small images that are read at once."""

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
        class_names: names of the class folders, if there are any.
        notes: what the user is told of how the folder was read, a line each.
    """

    path: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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

    def labelled_for(self, data: str, num_classes: int, *, shown: bool) -> ImageFolder:
        """Return this folder, without its labels if one of them is no class of a data set; say so if ``shown``."""
        foreign = [label for label in self.labels or () if label >= num_classes]
        if not foreign:
            return self
        if shown:
            known = f"{data} has 0 to {num_classes - 1}"
            say(redact(f"{self.path}: names of files hold class {foreign[0]}, and {known}: no labels are read"))
        return replace(self, labels=None)

    def _read(self, position: int) -> np.ndarray:
        try:
            return np.asarray(read_rgb(self.files[position]))
        except (ImageFileError, OSError) as error:
            reason = reason_of(error)
            raise DataError(f"{str(self.files[position])!r}: not a readable image ({reason}); remove it") from None


def image_folder(path: Path) -> ImageFolder:
    """Return the images of a folder: those of all its splits and classes, or those in it if it has no class folders.

    Samples of scripts/sample_images.py are read without the folders beside them.

    Raises:
        DataError: if there is no such folder, no image in it, or its layout is ambiguous.
    """
    if not path.is_dir():
        raise DataError(f"{str(path)!r}: no such folder")
    try:
        listing = list_images(path)
        samples = [name for name in listing.images if "/" not in name]
        are_samples = bool(samples) and all(map(SAMPLE_NAME.fullmatch, samples))
        found = None if are_samples or len(samples) == len(listing.images) else arrange(listing)
    except FolderError as error:
        raise DataError(f"{str(path)!r}: {error}") from None
    names = samples if found is None else found.images
    if not names:
        told = f" ({passed_over_line(listing.passed_over)})" if listing.passed_over else ""
        raise DataError(f"{str(path)!r}: no images in it{told}; expected such as .png, .jpg, .webp or .tif")
    matches = [SAMPLE_LABEL.fullmatch(Path(name).name) for name in names]
    labels = tuple(int(match[1]) for match in matches if match)
    return ImageFolder(
        path,
        tuple(path / name for name in names),
        labels if len(labels) == len(names) else None,
        found.class_names if found else (),
        (*_what_is_read(listing, found), *notes(listing, found)),
    )


def _what_is_read(listing: Listing, found: Arrangement | None) -> Iterator[str]:
    if found is None:
        if below := sum("/" in name for name in listing.images):
            yield f"{counted(below, 'image')} in folders beside the samples: not read"
        return
    yield shown_classes(found.class_names)
    splits = [f"{folder}/" for folder in (found.train_folder, found.val_folder, *found.unread) if folder]
    if len(splits) > 1:
        yield f"all splits are measured together: {', '.join(splits)}; name one to measure it alone"


def announce_folder(folder: ImageFolder, *, shown: bool) -> None:
    """Print how many images a folder holds, and what is not read, if this process is the one to show it."""
    for note in (counted(len(folder), "image"), *folder.notes) if shown else ():
        say(redact(f"{folder.path}: {note}"))


class FolderLows:
    """The images of a folder as the small images that a model upsamples.

    Files named as ``scripts/sample_images.py`` names them belong to the same requests here. Other images are numbered
    in order, within their class if the folder has one sub-folder for each class of the model.

    Args:
        path: the folder.
        shape_CHW: shape of the small images.
        class_names: classes of the model, by label; empty: none.
        needs_labels: whether the model has to be told the class.

    Attributes:
        requests: the images that can be sampled.

    Raises:
        DataError: if an image cannot be read, or has another size, or a class that the model does not know.
    """

    def __init__(
        self, path: Path, shape_CHW: tuple[int, int, int], class_names: Sequence[str], *, needs_labels: bool
    ) -> None:
        folder, (channels, height, width) = image_folder(path), shape_CHW
        self.requests = _requests(folder, class_names)
        labels = {image.label for image in self.requests}
        if class_names and needs_labels and NO_LABEL in labels:
            raise DataError(
                f"--low = {str(path)!r}: the images have no class, and the model was trained with "
                f"train.label_dropout = 0; expected names such as 3-0.png, or one sub-folder for each class"
            )
        if beyond := sorted(label for label in labels if class_names and label >= len(class_names)):
            raise DataError(f"--low = {str(path)!r}: class {beyond[0]}; the model knows 0 to {len(class_names) - 1}")
        parts = []
        for images_BCHW, _ in folder.batches(range(len(folder)), BATCH):
            if images_BCHW.shape[2:] != (height, width):
                found = f"{images_BCHW.shape[3]} x {images_BCHW.shape[2]}"
                raise DataError(
                    f"--low = {str(path)!r}: images of {found} pixels; expected {width} x {height} "
                    f"(scripts/prepare_images.py resizes them)"
                )
            parts.append(with_channels(images_BCHW, channels))
        self._images_NCHW = torch.cat(parts)
        self._place = {image: place for place, image in enumerate(self.requests)}

    @property
    def sha256(self) -> str:
        """Hash of the images and their requests."""
        return sha256(repr(self.requests), self._images_NCHW)

    def __call__(self, wanted: Sequence[Request]) -> Tensor:
        """Return the small images of some of the requests, uint8 ``(B, C, h, w)``."""
        return self._images_NCHW[[self._place[image] for image in wanted]]


def small_images(
    checkpoint: Checkpoint, config: CoreConfig, named: Mapping[str, str | Path | None]
) -> FolderLows | HeldOut | None:
    """Return what a model upsamples: images of a folder, or the held-out ones of its data set; None: it does not.

    Args:
        checkpoint: the model.
        config: its configuration, with the path of the data set.
        named: what the user gave, by option: ``--low``, the folder, and others that concern small images.

    Raises:
        ConfigError: if something was given for an ordinary model.
        DataError: if there are no small images, or they do not fit.
    """
    upsample, (channels, size, _) = config.upsample, checkpoint.shape_CHW
    if upsample.factor is None:
        for option, value in named.items():
            if value:
                raise ConfigError(
                    f"{option} = {str(value)!r}: {str(checkpoint.path)!r} is an ordinary model, which upsamples nothing"
                )
        return None
    if low := named["--low"]:
        names = checkpoint.class_names[: checkpoint.metadata["num_classes"]]
        small = size // upsample.factor
        return FolderLows(Path(low), (channels, small, small), names, needs_labels=config.train.label_dropout == 0.0)
    try:
        return held_out(load_data(config.data, recorded=checkpoint.class_names), upsample)
    except DataError as error:
        raise DataError(f"{error}; or name a folder of small images by --low") from None


def _requests(folder: ImageFolder, class_names: Sequence[str]) -> list[Request]:
    """Return the requests that the images of a folder belong to, in their order."""
    if all(SAMPLE_NAME.fullmatch(file.name) for file in folder.files):
        found = [request_of(file.name) for file in folder.files]
        if len(set(found)) == len(found):
            return found
    labels = {name: label for label, name in enumerate(class_names)}
    counts: dict[int, int] = {}
    found = []
    for file in folder.files:
        label = labels.get(file.parent.name, NO_LABEL) if folder.class_names else NO_LABEL
        counts[label] = counts.get(label, 0) + 1
        found.append(Request(label, counts[label] - 1))
    return found


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


def save_statistics(folder: Path, file: Path, extractor: Extractor, batch_size: int, *, shown: bool) -> None:
    """Write the statistics of a folder of images, by the process that is the one to show it."""
    statistics = see(folder, extractor, batch_size, keep=False).statistics
    if shown:
        with new_file(file, "PATH2") as temporary:
            write_statistics(temporary, statistics)
        described = f"extractor={extractor.name}, weights={extractor.weights}"
        print(f"{file}: statistics of {statistics.count:,} images, {described}")


def as_reference(path: Path, seen: Seen) -> Reference:
    """Return images as the reference of a comparison, named for their path."""
    count = "statistics" if seen.statistics.count is None else f"{seen.statistics.count:,} images"
    return Reference(space_name(path.stem), f"{path} ({count})", seen.statistics, seen.features_ND, seen.labels_N)


def check_paths(figures: Iterable[str], one: Path, two: Path) -> None:
    """Check that figures that the user asked for can be measured of two folders or files of statistics.

    Raises:
        ConfigError: if one cannot.
    """
    check_figures(figures, "a comparison of two paths", (LABELS, DATA_SET))
    for path in filter(is_statistics, (one, two)):
        check_figures(figures, repr(str(path)), (EVERY_IMAGE,))
    if is_statistics(one):
        check_figures(figures, repr(str(one)), (CLASSES,))


def compare_paths(
    figures: Sequence[str], one: Path, two: Path, extractors: Sequence[Extractor | None], batch_size: int
) -> Judgement:
    """Compare the images or statistics at one path with those at another one, in some feature spaces."""
    keep = needs_every_image(figures) and not (is_statistics(one) or is_statistics(two))
    found = Judgement()
    for extractor in extractors:
        theirs = as_reference(two, see(two, extractor, batch_size, keep=keep))
        ours = see(one, extractor, batch_size, keep=keep)
        found.compare(figures, ours, theirs, str(one), extractor)
    return found
