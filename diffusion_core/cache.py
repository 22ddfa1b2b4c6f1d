"""The cache of files that take long to compute or download: classifiers, statistics, decoded images, Inception weights.

It lies in ``$DIFFUSION_SWEEPS_CACHE``, or else in ``~/.cache/diffusion-sweeps``. A file's name contains a hash of what
the file was made from, so no file is ever out of date, and users may delete any of them at any time. (On a network
disk, decoded images that a running trial has mapped into memory are an exception.)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from diffusion_core.files import replaced_file
from diffusion_core.messages import reason_of

VARIABLE = "DIFFUSION_SWEEPS_CACHE"
REMEDY = f"set {VARIABLE} to another folder"


def cache_path(kind: str, name: str) -> Path:
    """Return where the cache keeps a file of a kind, whether or not the file exists."""
    root = os.environ.get(VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "diffusion-sweeps") / kind / name


def keep(path: Path, write: Callable[[Path], object], *, replace: bool = True, remedy: str = REMEDY) -> bool:
    """Write a file of the cache atomically; several processes may do so at the same time.

    Args:
        path: from :func:`cache_path`.
        write: writes the content to the path that it is given.
        replace: replace a file that another process has written meanwhile. If not, the first one written stays, and
            all callers read it back: needed where the same name does not imply the same content.
        remedy: what to do where it cannot be written.

    Returns:
        Whether the file was written. If the disk is full or read-only, one line on stderr says so.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path, concurrent=True, replace=replace) as temporary:
            write(temporary)
    except (OSError, SafetensorError) as error:
        print(f"cannot write {str(path)!r} ({reason_of(error)}); {remedy}", file=sys.stderr)
        return False
    return True
