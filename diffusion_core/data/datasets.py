"""Data sets: images and labels, read once into uint8 tensors.

Axes: N images of a data set, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion_core.config import DataConfig
from diffusion_core.data.image_files import IMAGE_SUFFIXES, ImageFileError, read_rgb, square
from diffusion_core.messages import UserError, one_line, reason_of
from diffusion_core.randomness import Purpose, generator
from diffusion_core.registries import DATASETS
from diffusion_core.terminal.progress import Shown

SPLIT_SEED = 0
"""The held-out split does not follow the run's seed: runs with different seeds are compared on the same images."""


class DataError(UserError):
    """Images that cannot be had or used; the message is one line meant for the user."""


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        images_NCHW: uint8.
        labels_N: int64, 0..num_classes-1.
    """

    images_NCHW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    def select(self, indices: Tensor) -> Images:
        """Return the images and labels at these indices, of shape ``(N,)``."""
        return Images(self.images_NCHW.index_select(0, indices), self.labels_N.index_select(0, indices))

    def to(self, device: torch.device) -> Images:
        """Return a copy on another device."""
        return Images(self.images_NCHW.to(device), self.labels_N.to(device))


@dataclass(frozen=True)
class Dataset:
    """Training images, held-out images, and the names of the classes."""

    train: Images
    val: Images
    class_names: tuple[str, ...]

    @property
    def shape_CHW(self) -> tuple[int, int, int]:
        """Shape of one image: channels, height, width."""
        channels, height, width = self.train.images_NCHW.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class DatasetRecord:
    """What is known of a data set before it is read.

    Attributes:
        load: reads it, at the size that the knobs say or at its own; ``progress`` shows a bar.
        help: what it is.
        channels: of its images.
        size: height and width of its images, or what they are scaled to unless ``data.image_size`` says otherwise.
        num_classes: None where it is known once the images are read.
        mirrored: whether its images are as natural in the mirror.
        path: what ``data.path`` is for it: ``required``, ``refused``, or a ``cache`` of downloads.
        least_images: images in its smaller split; None where it is known once they are read.
        quick_classifier: whether a classifier of it trains within seconds, so that one is used unless it is refused.
    """

    load: Callable[[DataConfig, bool], Dataset]
    help: str
    channels: int
    size: int
    num_classes: int | None = None
    mirrored: bool = False
    path: Literal["required", "refused", "cache"] = "cache"
    least_images: int | None = None
    quick_classifier: bool = False


def to_unit(images_BCHW: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images_BCHW.float().div_(127.5).sub_(1.0)


def to_uint8(images_BCHW: Tensor) -> Tensor:
    """Images in [-1, 1] (what lies outside is clipped) as uint8."""
    return images_BCHW.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def load_data(config: DataConfig, *, progress: bool = False) -> Dataset:
    """Read a data set into memory.

    Raises:
        DataError: if it cannot be downloaded, found or decoded.
    """
    record: DatasetRecord = DATASETS[config.name]
    dataset = record.load(config, progress)
    _, height, width = config.image_shape
    if dataset.train.images_NCHW.shape[2:] != (height, width):
        dataset = replace(dataset, train=_resized(dataset.train, height), val=_resized(dataset.val, height))
    return dataset


def look_at_data(config: DataConfig, *, progress: bool = False) -> tuple[str, int]:
    """Return what a data set holds, in words, and its number of classes. Download nothing.

    Raises:
        DataError: if it cannot be found or decoded.
    """
    record: DatasetRecord = DATASETS[config.name]
    if record.path == "cache" and record.num_classes is not None:
        place = _downloads(config)
        if place.exists() and not place.is_dir():
            raise DataError(f"data.path = {str(place)!r}: is no folder; expected one to keep downloads in")
        return f"{config.name}, {record.num_classes} classes; a run reads or downloads it below {place}", (
            record.num_classes
        )
    dataset = load_data(config, progress=progress)
    counts = f"{len(dataset.train):,} training images, {len(dataset.val):,} held out"
    return f"{config.name}, {counts}, {dataset.num_classes} classes", dataset.num_classes


def _downloads(config: DataConfig) -> Path:
    """Return where torchvision's files are kept."""
    return Path(config.path) if config.path else Path.home() / ".cache" / "torchvision"


def _load_digits(config: DataConfig, _progress: bool) -> Dataset:
    table_NP = _digits_table()
    images_NHW = torch.from_numpy(np.round(table_NP[:, :-1] * (255.0 / 16.0)).astype(np.uint8)).view(-1, 8, 8)
    everything = Images(images_NHW[:, None].contiguous(), torch.from_numpy(table_NP[:, -1].astype(np.int64)))
    train, val = stratified_split(everything, config.val_fraction)
    return Dataset(train, val, tuple(str(digit) for digit in range(10)))


def _digits_table() -> np.ndarray:
    """scikit-learn's digits: a row an image, its 64 pixels in 0..16, then its label."""
    # From its file, since to import scikit-learn takes longer than to train a step.
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations or []) if package else []:
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            with gzip.open(file, "rt") as text:
                return np.loadtxt(text, delimiter=",")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.concatenate([pixels, labels[:, None]], axis=1)


def _load_torchvision(name: str, config: DataConfig, _progress: bool) -> Dataset:
    from torchvision import datasets  # Slow to import, and `digits` and `folder` do without it.

    root = _downloads(config)
    loader = getattr(datasets, name)
    try:
        parts = [loader(str(root), train=train, download=True) for train in (True, False)]
    except Exception as error:  # Whatever a download raises (URLError, RuntimeError, OSError), the remedy is the same.
        reason = one_line(error)
        raise DataError(
            f"data.name = {config.name!r}: could not download or read it below {str(root)!r} ({reason}); put "
            f"torchvision's files there, or use data.name=digits (built in) or data.name=folder data.path=DIR"
        ) from None
    splits = []
    for part in parts:
        images = torch.as_tensor(np.asarray(part.data))
        images_NCHW = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        splits.append(Images(images_NCHW, torch.as_tensor(np.asarray(part.targets)).long()))
    return Dataset(splits[0], splits[1], tuple(str(name) for name in parts[0].classes))


def _load_folder(config: DataConfig, progress: bool) -> Dataset:
    assert config.path is not None  # The schema refuses such a configuration.
    root = Path(config.path)
    names = _subfolders(root)
    size = config.image_shape[1]
    for val_name in ("test", "val"):
        if names == sorted(["train", val_name]):
            class_names = _subfolders(root / "train")
            if class_names != _subfolders(root / val_name):
                raise DataError(f"data.path = {config.path!r}: train/ and {val_name}/ have different classes")
            train = _read_classes(root / "train", class_names, size, progress)
            return Dataset(train, _read_classes(root / val_name, class_names, size, progress), tuple(class_names))
    train, val = stratified_split(_read_classes(root, names, size, progress), config.val_fraction)
    return Dataset(train, val, tuple(names))


def _subfolders(root: Path) -> list[str]:
    if not root.is_dir():
        raise DataError(f"data.path = {str(root)!r}: no such folder")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"data.path = {str(root)!r}: no sub-folders; expected one sub-folder of images a class")
    return names


def _read_classes(root: Path, class_names: Sequence[str], size: int, progress: bool) -> Images:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"data.path = {str(root)!r}: class folder {name!r} holds no images")
        paths += found
        labels += [label] * len(found)
    images_NHWC = np.empty((len(paths), size, size, 3), dtype=np.uint8)

    def read(index: int) -> None:
        images_NHWC[index] = read_image(paths[index], size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done: Iterable[None] = pool.map(read, range(len(paths)), chunksize=64)
        for _ in Shown(done, f"reading {root.name}", len(paths), "image", shown=progress):
            pass
    return Images(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


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


def _resized(images: Images, size: int) -> Images:
    from torchvision.transforms.v2.functional import resize

    return replace(images, images_NCHW=resize(images.images_NCHW, [size, size], antialias=True))


def stratified_split(images: Images, val_fraction: float) -> tuple[Images, Images]:
    """Hold out the same share of every class (at least one image), always the same ones.

    Raises:
        DataError: if a class has a single image.
    """
    train: list[Tensor] = []
    val: list[Tensor] = []
    for label in images.labels_N.unique().tolist():
        members = (images.labels_N == label).nonzero()[:, 0]
        if len(members) < 2:
            raise DataError(f"class {label} has {len(members)} image; expected at least 2, one of them held out")
        held_out = max(1, round(val_fraction * len(members)))
        order = torch.randperm(len(members), generator=generator(SPLIT_SEED, Purpose.SPLIT, label))
        val.append(members[order[:held_out]])
        train.append(members[order[held_out:]])
    return images.select(torch.cat(train).sort().values), images.select(torch.cat(val).sort().values)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; nothing waits for the copy to a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


DATASETS["digits"] = DatasetRecord(
    _load_digits,
    "built in, 1,797 real digits of 8x8",
    channels=1,
    size=8,
    num_classes=10,
    path="refused",
    least_images=359,
    quick_classifier=True,
)
for _name, _class, _channels, _size, _classes, _mirrored in (
    ("cifar10", "CIFAR10", 3, 32, 10, True),
    ("cifar100", "CIFAR100", 3, 32, 100, True),
    ("mnist", "MNIST", 1, 28, 10, False),
    ("fashion_mnist", "FashionMNIST", 1, 28, 10, False),
):
    DATASETS[_name] = DatasetRecord(
        partial(_load_torchvision, _class),
        "downloaded once",
        channels=_channels,
        size=_size,
        num_classes=_classes,
        mirrored=_mirrored,
        least_images=10_000,
    )
DATASETS["folder"] = DatasetRecord(
    _load_folder, "one sub-folder a class under data.path", channels=3, size=32, mirrored=True, path="required"
)
