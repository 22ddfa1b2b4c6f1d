"""pytorch-fid's ``.npz`` files: mean (``mu``) and covariance (``sigma``) of the features of a set of images."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_core.data import DataError
from diffusion_core.evaluation.frechet import Statistics

COUNT = "count"
"""An entry that we add, and pytorch-fid does not mind: the number of images."""


def read_statistics(path: Path) -> Statistics:
    """Read statistics that pytorch-fid, or :func:`write_statistics`, has written; nothing in the file is run.

    Raises:
        DataError: if the file is missing, damaged, or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean_D = torch.from_numpy(np.atleast_1d(file["mu"]).astype(np.float64))
            covariance_DD = torch.from_numpy(np.atleast_2d(file["sigma"]).astype(np.float64))
            count = int(file[COUNT]) if COUNT in file else None
    except OSError as error:
        raise DataError(f"{str(path)!r}: {error.strerror or error}; expected statistics (.npz)") from None
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{str(path)!r}: no statistics of pytorch-fid's format ({reason})") from None
    if mean_D.ndim != 1 or covariance_DD.shape != (len(mean_D), len(mean_D)):
        raise DataError(
            f"{str(path)!r}: mu of {tuple(mean_D.shape)} and sigma of {tuple(covariance_DD.shape)} do not go together"
        )
    if not (torch.isfinite(mean_D).all() and torch.isfinite(covariance_DD).all()):
        raise DataError(f"{str(path)!r}: holds values that are not finite")
    return Statistics(count, mean_D, covariance_DD)


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write statistics in pytorch-fid's format."""
    entries: dict[str, Any] = {"mu": statistics.mean_D.numpy(), "sigma": statistics.covariance_DD.numpy()}
    if statistics.count is not None:
        entries[COUNT] = np.asarray(statistics.count)
    with path.open("wb") as file:  # NumPy would add a suffix to a bare path.
        np.savez(file, **entries)
