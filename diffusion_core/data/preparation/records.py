"""Records of image preparation: settings, jobs, results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from diffusion_core.messages import UserError

DATA_SETS = ("cifar10", "cifar100", "mnist", "fashion_mnist")
UNREADABLE = "unreadable"


class InputError(UserError):
    """An unusable argument; the message is one line for the user."""


@dataclass(frozen=True)
class Settings:
    """All options that change the content of TARGET; those that do not apply to a data set are None for one."""

    source: str
    size: int | None = None
    min_size: int | None = None
    crop: str | None = None
    format: str = "png"
    duplicates: str | None = None


class Job(NamedTuple):
    """An image to prepare."""

    source: str
    """Path below SOURCE; for a data set, split and index."""
    target: str
    """Path below TARGET."""
    stamp: str
    """Changes whenever the source image changes."""
    pixels: np.ndarray | None = None
    """The image itself if it comes from a data set: ``(H, W)`` or ``(H, W, 3)``, uint8."""


@dataclass(frozen=True)
class Source:
    """The images to prepare.

    Attributes:
        jobs: all images, sorted.
        ignored: number of files and folders that are not read, by kind.
        notes: what the user is told of how the folder was read, a line each.
    """

    jobs: list[Job]
    ignored: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """The outcome of a job."""

    source: str
    target: str
    stamp: str
    bytes: int = 0
    pixels: str = ""
    """Hash of the decoded pixels if duplicates are dropped."""
    dropped: str = ""
    """Why the image was dropped; empty if it was written."""
    detail: str = ""


@dataclass(frozen=True)
class Prepared:
    """The outcome of a call.

    Attributes:
        results: one per image, in the order of the jobs.
        report: content of the report file.
        done_before: number of results that come from an earlier call.
        removed: number of deleted images of an earlier call, because their sources changed or are gone.
    """

    results: list[Result]
    report: dict[str, Any]
    done_before: int
    removed: int
