"""Image files: from whatever Pillow reads to upright 8-bit RGB, in one way for training and for preparing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion_core.messages import one_line

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})


class ImageFileError(ValueError):
    """A file that is no readable image; the message is the reason, without the file's name."""


class ImageTooLarge(ImageFileError):
    """A file of so many pixels (Pillow's limit: about 179 million) that decoding it could exhaust the memory."""


def read_rgb(path: Path) -> Image.Image:
    """Decode an image: its first frame, upright as its EXIF data say, on white where it is transparent, in 8-bit RGB.

    Raises:
        ImageFileError: if its content is no readable image.
        OSError: if the file cannot be read at all.
    """
    try:
        with Image.open(path) as image:
            if image.format == "EPS":  # To decode it is to run it, in Ghostscript, whatever its suffix says.
                raise ImageFileError("PostScript")
            image.load()
            rgb = _on_white(_eight_bits(_upright(image)))
    except (ImageFileError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(one_line(error)) from None
    except UnidentifiedImageError:
        raise ImageFileError("no known image format") from None
    except Exception as error:  # Decoders meet damaged files with whatever their code happens to raise.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ImageFileError(one_line(error)) from None
    rgb.info.clear()  # Colour profiles, comments and places would be written along with the pixels.
    return rgb


def square(image: Image.Image, size: int) -> Image.Image:
    """The image with its shorter side scaled to ``size``, and its centre of that height and width."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Damaged EXIF data; the pixels are there, and shown as they are.
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    # Pillow clips samples of more than 8 bits on conversion, which would leave a white image.
    if image.mode in ("I", "F"):
        raise ImageFileError("32 bits a pixel; expected 8 or 16")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
