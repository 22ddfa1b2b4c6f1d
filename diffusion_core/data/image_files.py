"""Decode image files to upright 8-bit RGB, for training and for image preparation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion_core.messages import UserError, one_line

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})


class ImageFileError(UserError):
    """A file that is not a readable image; the message is the reason, without the name of the file."""


class ImageTooLarge(ImageFileError):
    """A file with more pixels than Pillow's limit (about 179 million); decoding it could exhaust the memory."""


def read_rgb(path: Path) -> Image.Image:
    """Decode the first frame of an image: rotated as its EXIF data say, on white where it is transparent, in 8-bit RGB.

    Raises:
        ImageFileError: if its content is not a readable image.
        OSError: if the file cannot be read at all.
    """
    try:
        with Image.open(path) as image:
            if image.format == "EPS":  # Ghostscript would run it as a program, whatever the suffix.
                raise ImageFileError("PostScript")
            image.load()
            rgb = _on_white(_eight_bits(_upright(image)))
    except (ImageFileError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(one_line(error)) from None
    except UnidentifiedImageError:
        raise ImageFileError("no known image format") from None
    except Exception as error:  # Decoders raise errors of any kind for damaged files.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ImageFileError(one_line(error)) from None
    rgb.info.clear()  # Do not write colour profiles, comments and locations.
    return rgb


def square(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side of an image to ``size`` pixels, and crop its centre to a square."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Damaged EXIF data: use the pixels as they are.
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    # Pillow would clip samples of more than 8 bits to white.
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
