"""Keep the decoded images of a large folder in the cache: the next trial of a sweep need not decode them again.

Processes map the file into memory, so those of one machine share what they have read of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL

from diffusion_core.cache import VARIABLE, cache_path, keep
from diffusion_core.files import free_bytes, sha256
from diffusion_core.messages import size_in_words
from diffusion_core.terminal.progress import say

VERSION = 2
"""Version of how images are decoded: increment it when that changes."""
FROM = 5_000
"""Number of images from which decoding takes seconds."""
SPARE_BYTES = 2**30
"""Bytes that stay free on the disk of the cache."""


def decoded_once(root: Path, names: Sequence[str], size: int, decode: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the images of a folder, from the cache if they are there: ``(N, 3, size, size)`` uint8.

    Few images are always decoded, and so are those that the disk of the cache has no room for.

    Args:
        root: the folder.
        names: paths of the images below it, in the order of the result.
        size: height and width of the result.
        decode: returns the images; called if the cache lacks them, or if a file has changed since.
    """
    if len(names) < FROM:
        return decode()
    try:
        file = cache_path("decoded", f"{_identity(root, names, size)}.npy")
    except OSError:  # An image cannot be read: decoding says which, and why.
        return decode()
    shape = len(names), 3, size, size
    if (kept := _kept(file, shape)) is not None:
        return kept
    images_NCHW = decode()
    if not _has_room(file.parent, images_NCHW.nbytes) or not keep(file, lambda path: _write(path, images_NCHW)):
        return images_NCHW
    kept = _kept(file, shape)
    return images_NCHW if kept is None else kept


def _kept(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the images in a file of the cache, which are read when they are used; None if it is missing or damaged."""
    try:
        # A write would change the copy of this process, not the file. PyTorch takes no arrays that cannot be written.
        kept: np.ndarray = np.load(file, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return kept if kept.shape == shape and kept.dtype == np.uint8 else None


def _has_room(folder: Path, size: int) -> bool:
    """Return whether a file fits on the disk of the cache. If not, one line on stderr says so."""
    free = free_bytes(folder)
    if free >= size + SPARE_BYTES:
        return True
    say(
        f"{str(folder)!r}: {size_in_words(free)} are free, too few to keep {size_in_words(size)} of decoded images, so "
        f"each start decodes them; set {VARIABLE} to a folder with more room"
    )
    return False


def _identity(root: Path, names: Sequence[str], size: int) -> str:
    """Hash the sizes and times of the files, the size of the images, and the versions of the decoders."""

    def parts() -> Iterator[str]:
        yield f"{VERSION} {PIL.__version__} {size}"
        for name in names:
            found = (root / name).stat()
            # Every change of a file's content sets the last of these, even if it restores the one before.
            yield f"\n{name}\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"

    return sha256(*parts())


def _write(path: Path, images_NCHW: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save would append a suffix to a path.
        np.save(file, images_NCHW, allow_pickle=False)
