"""Pictures inside a page: shrunk grids and small animations, as data URIs."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 360
"""Greatest width and height of a grid in a page."""
FEWEST_PIXELS = 160
"""Smaller pictures are enlarged to at least this width or height, by repeating pixels."""
MOST_GIF_BYTES = 1_500_000
QUALITY = 80
"""WebP quality of shrunk grids."""


def shrunk(path: Path, most: int = MOST_PIXELS, fewest: int = FEWEST_PIXELS) -> Image:
    """Return a picture of at most ``most`` pixels in each direction.

    A larger one is shrunk. One whose longer side is below ``fewest`` is enlarged by an integer factor with nearest
    neighbour, so that single pixels stay visible.

    Raises:
        OSError: if the file is no picture.
    """
    from PIL import Image  # Not imported with the module: the process of a sweep does without.

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except Image.DecompressionBombError as error:
        raise OSError(str(error)) from None
    longest = max(image.size)
    if longest > most:
        image.thumbnail((most, most), Image.Resampling.LANCZOS)
    elif longest < fewest:
        factor = max(1, min(math.ceil(fewest / longest), most // longest))
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image


def grid_uri(path: Path, most: int = MOST_PIXELS) -> str | None:
    """Return a grid as a data URI, shrunk; None if the file is missing or no picture."""
    buffer = io.BytesIO()
    try:
        shrunk(path, most).save(buffer, "webp", quality=QUALITY, method=4)
    except (OSError, ValueError, SyntaxError):  # SyntaxError: Pillow's word for a broken PNG.
        return None
    return data_uri(buffer.getvalue(), "image/webp")


def animation_uri(path: Path) -> str | None:
    """Return a GIF as a data URI, as it is; None if it is missing, no GIF, or larger than ``MOST_GIF_BYTES``."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) > MOST_GIF_BYTES or not content.startswith((b"GIF87a", b"GIF89a")):
        return None
    return data_uri(content, "image/gif")


def data_uri(content: bytes, kind: str) -> str:
    """Return bytes as a data URI of a media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
