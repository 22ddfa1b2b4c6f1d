"""Where things are kept that take long to compute or download: classifiers, statistics of data sets, Inception weights.

``$DIFFUSION_SWEEPS_CACHE``, or ``~/.cache/diffusion-sweeps``. What is there is named for what it was made from, so that
nothing in it is ever out of date, and all of it may be deleted at any time.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from diffusion_core.messages import reason_of

VARIABLE = "DIFFUSION_SWEEPS_CACHE"


def cache_path(kind: str, name: str) -> Path:
    """Where a file of some kind is kept; it may not be there."""
    root = os.environ.get(VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "diffusion-sweeps") / kind / name


def keep(path: Path, write: Callable[[Path], object]) -> bool:
    """Write a file in one piece, so that other processes see it whole or not at all.

    Returns:
        Whether it is there; a cache that takes no more is no error, and one line on stderr says so.
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        print(f"cannot keep {str(path)!r} ({reason_of(error)}); set {VARIABLE}", file=sys.stderr)
        return False
    return True
