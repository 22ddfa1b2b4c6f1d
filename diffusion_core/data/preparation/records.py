"""What is asked for, an image to make, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DATA_SETS = ("cifar10", "cifar100", "mnist", "fashion_mnist")
UNREADABLE = "unreadable"


class InputError(ValueError):
    """Something asked for that cannot be had; the message is one line meant for the user."""


@dataclass(frozen=True)
class Settings:
    """What decides how TARGET looks; the options that have no meaning for a data set are None there."""

    source: str
    size: int | None = None
    min_size: int | None = None
    crop: str | None = None
    format: str = "png"
    duplicates: str | None = None


class Job(NamedTuple):
    """An image to make."""

    source: str
    """Path below SOURCE, or split and number in a data set."""
    target: str
    """Path below TARGET."""
    stamp: str
    """Changes when the source does."""
    pixels: np.ndarray | None = None
    """The image itself where it comes from a data set: ``(H, W)`` or ``(H, W, 3)``, uint8."""


@dataclass(frozen=True)
class Result:
    """What became of a job."""

    source: str
    target: str
    stamp: str
    bytes: int = 0
    pixels: str = ""
    """Hash of the decoded pixels, where duplicates are looked for."""
    dropped: str = ""
    """Kind of reason; empty: the image was made."""
    detail: str = ""
