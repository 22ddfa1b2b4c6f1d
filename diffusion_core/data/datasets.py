"""Data sets: images and labels, read once into uint8 tensors.

Axes: N images of a data set, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion_core.config import DataConfig
from diffusion_core.data.classes import in_order
from diffusion_core.data.folders import single_image
from diffusion_core.files import sha256
from diffusion_core.messages import UserError, one_line
from diffusion_core.randomness import Purpose, generator
from diffusion_core.registries import DATASETS

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
    """Training images, held-out images, and the names of the classes.

    Attributes:
        train: the training images.
        val: the images that are held out.
        class_names: by label.
        held_out: which images are held out, in words.
        notes: what a command says of how the images were read, a line each.
    """

    train: Images
    val: Images
    class_names: tuple[str, ...]
    held_out: str = ""
    notes: tuple[str, ...] = ()

    @property
    def shape_CHW(self) -> tuple[int, int, int]:
        """Shape of one image: channels, height, width."""
        channels, height, width = self.train.images_NCHW.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all images, labels and class names: equal for equal data, wherever it was read from."""
        parts: list[str | Tensor] = [repr((self.shape_CHW, self.class_names))]
        for split in (self.train, self.val):
            parts += [repr(len(split)), split.images_NCHW, split.labels_N]
        return sha256(*parts)


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
        load_ordered: reads it with its classes in a given order; None if their order is fixed.
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
    load_ordered: Callable[[DataConfig, bool, Sequence[str]], Dataset] | None = None


def to_unit(images_BCHW: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images_BCHW.float().div_(127.5).sub_(1.0)


def to_uint8(images_BCHW: Tensor) -> Tensor:
    """Images in [-1, 1] (what lies outside is clipped) as uint8."""
    return images_BCHW.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def load_data(config: DataConfig, *, progress: bool = False, recorded: Sequence[str] = ()) -> Dataset:
    """Read a data set into memory.

    Args:
        config: which one.
        progress: show a bar.
        recorded: names of a checkpoint's classes, for :func:`in_recorded_order`.

    Raises:
        DataError: if it cannot be downloaded, found or decoded.
    """
    record: DatasetRecord = DATASETS[config.name]
    dataset = in_recorded_order(record.load(config, progress), config, recorded, progress=progress)
    _, height, width = config.image_shape
    if dataset.train.images_NCHW.shape[2:] != (height, width):
        dataset = replace(dataset, train=_resized(dataset.train, height), val=_resized(dataset.val, height))
    return dataset


def downloads_of(config: DataConfig) -> Path:
    """Return where torchvision's files are kept."""
    return Path(config.path) if config.path else Path.home() / ".cache" / "torchvision"


def in_recorded_order(
    dataset: Dataset, config: DataConfig, recorded: Sequence[str], *, progress: bool = False
) -> Dataset:
    """Return a data set with the labels of a checkpoint, whose classes may be in another order than here.

    Args:
        dataset: the data set, which is returned if its classes are others or in this order.
        config: where to read it again: which images are held out depends on the labels.
        recorded: names of the checkpoint's classes, by label.
        progress: show a bar.
    """
    names = in_order(dataset.class_names, recorded)
    if names == dataset.class_names:
        return dataset
    record: DatasetRecord = DATASETS[config.name]
    if record.load_ordered is not None:
        return record.load_ordered(config, progress, names)
    new = torch.tensor([names.index(name) for name in dataset.class_names])
    train, val = (replace(part, labels_N=new[part.labels_N]) for part in (dataset.train, dataset.val))
    return replace(dataset, train=train, val=val, class_names=names)


def _load_digits(config: DataConfig, _progress: bool) -> Dataset:
    table_NP = _digits_table()
    images_NHW = torch.from_numpy(np.round(table_NP[:, :-1] * (255.0 / 16.0)).astype(np.uint8)).view(-1, 8, 8)
    everything = Images(images_NHW[:, None].contiguous(), torch.from_numpy(table_NP[:, -1].astype(np.int64)))
    train, val = stratified_split(everything, config.val_fraction)
    return Dataset(train, val, tuple(str(digit) for digit in range(10)), share_held_out(config))


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

    root = downloads_of(config)
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
    return Dataset(splits[0], splits[1], tuple(str(name) for name in parts[0].classes), "its test images")


def share_held_out(config: DataConfig) -> str:
    """Return in words which images :func:`stratified_split` holds out."""
    return f"{config.val_fraction:.3g} of each class"


def _resized(images: Images, size: int) -> Images:
    from torchvision.transforms.v2.functional import resize

    return replace(images, images_NCHW=resize(images.images_NCHW, [size, size], antialias=True))


def stratified_split(images: Images, val_fraction: float, class_names: Sequence[str] = ()) -> tuple[Images, Images]:
    """Hold out the same share of every class (at least one image), always the same ones.

    Args:
        images: all images.
        val_fraction: share to hold out, in (0, 1).
        class_names: by label, for messages.

    Raises:
        DataError: if a class has a single image.
    """
    train: list[Tensor] = []
    val: list[Tensor] = []
    for label in images.labels_N.unique().tolist():
        members = (images.labels_N == label).nonzero()[:, 0]
        if len(members) < 2:
            raise DataError(single_image([class_names[label] if class_names else str(label)]))
        held_out = max(1, round(val_fraction * len(members)))
        order = torch.randperm(len(members), generator=generator(SPLIT_SEED, Purpose.SPLIT, label))
        val.append(members[order[:held_out]])
        train.append(members[order[held_out:]])
    return images.select(torch.cat(train).sort().values), images.select(torch.cat(val).sort().values)


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
