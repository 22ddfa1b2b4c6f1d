"""The real images that generated ones are compared to: their features are computed once, and kept in the cache."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_core.cache import cache_path, keep
from diffusion_core.data import DataError, Images
from diffusion_core.evaluation.features import HASH_DIGITS, Extractor, fingerprint
from diffusion_core.evaluation.frechet import Statistics
from diffusion_core.evaluation.measure import Reference, look
from diffusion_core.evaluation.processes import add_up, shared_out
from diffusion_core.evaluation.statistics_file import read_statistics, write_statistics

BATCH = 64

Share = Callable[[str, str, Path], None]
"""Told of statistics that were computed anew: name, source, file."""


def reference_for(
    images: Images, data: str, split: str, extractor: Extractor, *, keep_features: bool, share: Share | None = None
) -> Reference:
    """The reference that a split of a data set is, from the cache, or else computed by all processes together.

    Args:
        images: the split.
        data: the data set's name.
        split: ``train`` or ``val``.
        extractor: the feature space.
        keep_features: whether more than the moments are needed.
        share: told of the file of statistics where they were computed anew.
    """
    digest = fingerprint(images)
    source = f"{data}/{split} ({len(images):,} images, {digest})"
    key = hashlib.sha256(f"{digest} {extractor.name} {extractor.weights}".encode()).hexdigest()[:HASH_DIGITS]
    name = f"{data}-{split}-{extractor.name}-{key}"
    statistics_file = cache_path("references", f"{name}.npz")
    features_file = cache_path("references", f"{name}.safetensors")
    found = _kept(statistics_file, features_file if keep_features else None)
    if int(add_up(torch.tensor(float(found is None)))) == 0:  # All processes have it, or all compute.
        assert found is not None
        statistics, features_ND = found
    else:
        (seen,) = look([extractor], _batches(images), len(images), keep=keep_features)
        statistics, features_ND = seen.statistics, seen.features_ND
        if keep(statistics_file, lambda path: write_statistics(path, statistics)) and share is not None:
            share(f"reference-{name}", source, statistics_file)
        if features_ND is not None:
            tensors = {"features": features_ND}
            keep(features_file, lambda path: save_file(tensors, path))
    return Reference(split, source, statistics, features_ND, images.labels_N.cpu())


def _batches(images: Images) -> Iterator[tuple[Tensor, None]]:
    for chunk in torch.tensor(shared_out(len(images))).clamp(max=len(images) - 1).split(BATCH):
        yield images.images_NCHW[chunk.to(images.images_NCHW.device)], None


def _kept(statistics_file: Path, features_file: Path | None) -> tuple[Statistics, Tensor | None] | None:
    """What the cache holds, or None; a damaged file is made anew."""
    if not statistics_file.is_file() or not (features_file is None or features_file.is_file()):
        return None
    try:
        features_ND = None if features_file is None else load_file(features_file)["features"]
        return read_statistics(statistics_file), features_ND
    except (DataError, SafetensorError, OSError, KeyError) as error:
        print(f"computing {statistics_file.stem} anew ({error})", file=sys.stderr)
        return None
