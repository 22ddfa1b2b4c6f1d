"""What scripts/evaluate.py judges and compares to: folders of images, files of statistics, models."""

from __future__ import annotations

import json
from pathlib import Path

from agent.results import JSON_FILE
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.data import DataError
from diffusion_core.evaluation.features import Extractor
from diffusion_core.evaluation.folders import image_folder
from diffusion_core.evaluation.measure import FEWEST, Reference, Seen, look
from diffusion_core.evaluation.processes import shared_out
from diffusion_core.evaluation.statistics_file import read_statistics
from diffusion_core.figure_names import space_name

STATISTICS_SUFFIX = ".npz"
STATISTICS_SPACE = "statistics"
"""The feature space of two files of statistics, which do not say what theirs is."""


def is_statistics(path: Path) -> bool:
    """Whether a path names a file of statistics, rather than a folder of images."""
    return path.suffix == STATISTICS_SUFFIX


def see(path: Path, extractor: Extractor | None, batch_size: int, *, keep: bool) -> Seen:
    """What a folder of images, or a file of statistics, is in a feature space.

    Raises:
        DataError: if it is missing, empty, damaged, or holds a single image.
    """
    if is_statistics(path):
        return Seen(extractor.name if extractor else STATISTICS_SPACE, read_statistics(path))
    assert extractor is not None
    folder = image_folder(path)
    if len(folder) < FEWEST:
        raise DataError(f"{str(path)!r}: holds a single image; expected at least {FEWEST} to compare")
    batches = folder.batches(shared_out(len(folder)), batch_size)
    (seen,) = look([extractor], batches, len(folder), keep=keep)
    return seen


def as_reference(path: Path, seen: Seen) -> Reference:
    """A set of images as what others are compared to, named for its path."""
    count = "statistics" if seen.statistics.count is None else f"{seen.statistics.count:,} images"
    return Reference(space_name(path.stem), f"{path} ({count})", seen.statistics, seen.features_ND, seen.labels_N)


def best_of_sweep(folder: Path) -> Path:
    """The best checkpoint of the best trial of an offline sweep."""
    try:
        trials = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        return Path(next(trial["best_checkpoint"] for trial in trials if trial["best_checkpoint"]))
    except (OSError, ValueError, StopIteration, KeyError, TypeError):
        raise CheckpointError(f"--sweep = {str(folder)!r}: no finished trial in its {JSON_FILE}") from None
