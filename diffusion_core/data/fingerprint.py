"""Tell whether images are those that a run or a checkpoint was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_core.redact import redact, redacted
from diffusion_core.terminal.progress import say

if TYPE_CHECKING:
    from diffusion_core.data.datasets import Dataset

RECORDED = "data"
"""Key of a checkpoint's metadata for the images that it was trained with. Older checkpoints lack it."""


def describe_data(name: str, dataset: Dataset) -> dict[str, Any]:
    """Describe the images of a run as JSON that is equal for equal images."""
    return {
        "name": name,
        "image_shape": list(dataset.shape_CHW),
        "class_names": redacted(list(dataset.class_names)),
        "train_images": len(dataset.train),
        "val_images": len(dataset.val),
        "sha256": dataset.sha256,
    }


def describe_changed(file: Path, described: Mapping[str, Any]) -> str | None:
    """Return a warning if a run's images are not those of ``data.json``; None if they are, or it cannot be read.

    Args:
        file: the run's ``data.json``.
        described: the images now, as :func:`describe_data` describes them.
    """
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _changed(then, described, "the run was started with")


def say_others(metadata: Mapping[str, Any], name: str, dataset: Dataset, which: str) -> None:
    """Print a warning if a checkpoint was trained with other images of a data set, such as a folder that has grown.

    Then another part of them is held out, and what it was trained with may be. Nothing is printed if the images are the
    same, if the checkpoint does not say, or if it is of another data set: of another name, other classes or size.

    Args:
        metadata: that of the checkpoint.
        name: ``data.name``.
        dataset: the images now, in the order of the checkpoint's classes.
        which: the checkpoint, in words.
    """
    then = metadata.get(RECORDED)
    alike = metadata["class_names"], metadata["image_shape"]
    if not isinstance(then, dict) or then.get("name") != name:
        return
    if alike != (redacted(list(dataset.class_names)), list(dataset.shape_CHW)):
        return
    if said := _changed(then, describe_data(name, dataset), f"{redact(which)} was trained with"):
        flattered = "what it was trained with may be held out now, which flatters its figures: take the former images"
        say(f"{said}; {flattered}")


def _changed(then: Any, described: Mapping[str, Any], whose: str) -> str | None:
    """Return a warning if images are others than those that were recorded; None if not, or if the record is damaged."""
    try:
        if then["sha256"] == described["sha256"]:
            return None
        counts = f"{then['train_images']:,} for training and {then['val_images']:,} held out"
    except (KeyError, TypeError, ValueError):
        return None
    return (
        f"warning: data.name = {described['name']}: not the images that {whose}, which were {counts}; "
        f"now {described['train_images']:,} and {described['val_images']:,}"
    )
