"""Statistics and features of real images: computed, cached, and read from and written to ``.npz`` files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_core.cache import cache_path, keep
from diffusion_core.data.datasets import DataError, Images
from diffusion_core.distributed import own_positions, sum_over_processes
from diffusion_core.evaluation.distances import Statistics
from diffusion_core.evaluation.features import HASH_DIGITS, Extractor, images_hash
from diffusion_core.evaluation.measure import Reference, look
from diffusion_core.files import first_not_finite, sha256
from diffusion_core.messages import one_line, reason_of
from diffusion_core.terminal.progress import say

BATCH = 64

VERSION = 2
"""Version of cached statistics: increment it when those of before are not to be used."""

Share = Callable[[str, str, Path], None]
"""Called with statistics that were computed: name, source, file."""

COUNT = "count"
"""An additional entry for the number of images; pytorch-fid ignores it."""


def reference_for(
    images: Images, data: str, split: str, extractor: Extractor, *, keep_features: bool, share: Share | None = None
) -> Reference:
    """Return the reference of a split of a data set: from the cache, or computed by all processes together.

    Args:
        images: the split.
        data: the data set's name.
        split: ``train`` or ``val``.
        extractor: the feature network.
        keep_features: keep the features of every image, not only moments.
        share: called with the file of statistics if they were computed.
    """
    digest = images_hash(images)
    source = f"{data}/{split} ({len(images):,} images, {digest})"
    key = sha256(f"{VERSION} {digest} {extractor.name} {extractor.weights}")[:HASH_DIGITS]
    name = f"{data}-{split}-{extractor.name}-{key}"
    statistics_file = cache_path("references", f"{name}.npz")
    features_file = cache_path("references", f"{name}.safetensors")
    found = _kept(statistics_file, features_file if keep_features else None)
    if int(sum_over_processes(torch.tensor(float(found is None)))) == 0:  # Compute unless every process found it.
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
    for chunk in torch.tensor(own_positions(len(images))).clamp(max=len(images) - 1).split(BATCH):
        yield images.images_NCHW[chunk.to(images.images_NCHW.device)], None


def _kept(statistics_file: Path, features_file: Path | None) -> tuple[Statistics, Tensor | None] | None:
    """Return the cached statistics and features; None if they are missing or damaged."""
    if not statistics_file.is_file() or not (features_file is None or features_file.is_file()):
        return None
    try:
        features_ND = None if features_file is None else load_file(features_file)["features"]
        if features_ND is not None and first_not_finite({"features": features_ND}):
            raise DataError(f"{str(features_file)!r}: holds values that are not finite")
        return read_statistics(statistics_file), features_ND
    except (DataError, SafetensorError, OSError, KeyError) as error:
        say(f"computing {statistics_file.stem} again: {error}")
        return None


def read_statistics(path: Path) -> Statistics:
    """Read statistics that pytorch-fid or :func:`write_statistics` wrote, without running code from the file.

    Raises:
        DataError: if the file is missing, damaged, or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean_D = torch.from_numpy(np.atleast_1d(file["mu"]).astype(np.float64))
            covariance_DD = torch.from_numpy(np.atleast_2d(file["sigma"]).astype(np.float64))
            count = int(file[COUNT]) if COUNT in file else None
    except OSError as error:
        raise DataError(f"{str(path)!r}: {reason_of(error)}; expected statistics (.npz)") from None
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        reason = one_line(error)
        raise DataError(f"{str(path)!r}: not statistics in pytorch-fid's format ({reason})") from None
    if mean_D.ndim != 1 or covariance_DD.shape != (len(mean_D), len(mean_D)):
        raise DataError(
            f"{str(path)!r}: mu of {tuple(mean_D.shape)} and sigma of {tuple(covariance_DD.shape)} do not match"
        )
    if first_not_finite({"mu": mean_D, "sigma": covariance_DD}):
        raise DataError(f"{str(path)!r}: holds values that are not finite")
    return Statistics(count, mean_D, covariance_DD)


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write statistics in pytorch-fid's format."""
    entries: dict[str, Any] = {"mu": statistics.mean_D.numpy(), "sigma": statistics.covariance_DD.numpy()}
    if statistics.count is not None:
        entries[COUNT] = np.asarray(statistics.count)
    with path.open("wb") as file:  # NumPy would add a suffix to a bare path.
        np.savez(file, **entries)
