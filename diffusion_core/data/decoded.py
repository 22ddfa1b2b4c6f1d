"""Keep the decoded images of a large folder in the cache: the next trial of a sweep need not decode them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL

from diffusion_core.cache import cache_path, keep
from diffusion_core.files import sha256

VERSION = 1
"""Version of how images are decoded: increment it when that changes."""
FROM = 5_000
"""Number of images from which decoding takes seconds."""
MOST_BYTES = 4 * 2**30


def decoded_once(root: Path, names: Sequence[str], size: int, decode: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the images of a folder, from the cache if they are there: ``(N, size, size, 3)`` uint8.

    Few images, and more than :data:`MOST_BYTES`, are always decoded.

    Args:
        root: the folder.
        names: paths of the images below it, in the order of the result.
        size: height and width of the result.
        decode: returns the images; called if the cache lacks them, or if a file has changed since.
    """
    shape = len(names), size, size, 3
    if len(names) < FROM or np.prod(shape) > MOST_BYTES:
        return decode()
    try:
        file = cache_path("decoded", f"{_identity(root, names, size)}.npy")
    except OSError:  # An image cannot be read: decoding says which, and why.
        return decode()
    try:
        kept: np.ndarray = np.load(file, allow_pickle=False)
        if kept.shape == shape and kept.dtype == np.uint8:
            return kept
    except (OSError, ValueError, EOFError):  # Missing, or damaged.
        pass
    images_NHWC = decode()
    keep(file, lambda path: _write(path, images_NHWC))
    return images_NHWC


def _identity(root: Path, names: Sequence[str], size: int) -> str:
    """Hash the sizes and times of the files, the size of the images, and the versions of the decoders."""

    def parts() -> Iterator[str]:
        yield f"{VERSION} {PIL.__version__} {size}"
        for name in names:
            found = (root / name).stat()
            # Every change of a file's content sets the last of these, even if it restores the one before.
            yield f"\n{name}\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"

    return sha256(*parts())


def _write(path: Path, images_NHWC: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save would append a suffix to a path.
        np.save(file, images_NHWC, allow_pickle=False)
