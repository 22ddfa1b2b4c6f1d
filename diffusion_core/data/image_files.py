"""Decode image files to upright 8-bit RGB, for training and for image preparation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from diffusion_core.messages import UserError, one_line

IMAGE_SUFFIXES = frozenset({
    ".apng", ".avif", ".avifs", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".flc", ".fli", ".ftc",
    ".ftu", ".gbr", ".gif", ".icb", ".icns", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe",
    ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".msp", ".pbm", ".pcd", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd",
    ".pxr", ".qoi", ".ras", ".rgb", ".rgba", ".sgi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp", ".xbm",
    ".xpm",
})  # fmt: skip
"""Suffixes of the picture formats that Pillow decodes by itself. Left out are programs (EPS), stubs, formats of
measured numbers, whose range is unknown (FITS, PFM), and IM, which Pillow gives up."""

WHITE_IS_ZERO = 0
PHOTOMETRIC = 262
"""Tag of TIFF (6.0, section 3) that says whether 0 is white (:data:`WHITE_IS_ZERO`) or black."""


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
            raw = _raw_mode(image)
            white_is_zero = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
            image.load()
            rgb = _on_white(_eight_bits(_upright(image), raw, image.format, white_is_zero=white_is_zero))
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


def _raw_mode(image: Image.Image) -> str:
    """Return how the file stores its samples, in Pillow's words; known until the image is loaded."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0].args if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _eight_bits(image: Image.Image, raw: str, kind: str | None, *, white_is_zero: bool) -> Image.Image:
    """Return an image with 8 bits a sample, and its transparent colour (``tRNS`` of PNG) in those."""
    # Pillow would clip samples of more than 8 bits to white.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):  # It scales PPM to 0..65535.
        return _from_sixteen_bits(image, 12 if raw == "I;12" else 16, white_is_zero=white_is_zero)
    if image.mode in ("I", "F"):
        raise ImageFileError("samples of 32 bits or with a sign, whose range is unknown; expected 8 or 16 bits")
    # Pillow scales samples to 8 bits, and leaves the transparent colour as the file has it.
    transparent, most = image.info.get("transparency"), {"L;2": 3, "L;4": 15}.get(raw)
    if isinstance(transparent, int) and most is not None:
        image.info["transparency"] = transparent * 255 // most
    elif isinstance(transparent, tuple) and raw == "RGB;16B":  # The low bits are gone, so near colours count as well.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image


def _from_sixteen_bits(image: Image.Image, bits: int, *, white_is_zero: bool) -> Image.Image:
    samples_HW = np.asarray(image)
    gray_HW = (samples_HW >> (bits - 8)).astype(np.uint8)
    gray = Image.fromarray(255 - gray_HW if white_is_zero else gray_HW)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(samples_HW == transparent, 0, 255).astype(np.uint8)))
    return gray


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
